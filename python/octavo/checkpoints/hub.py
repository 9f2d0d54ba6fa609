"""Downloads from the Hugging Face hub: a repository's files that a model is loaded from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from octavo.checkpoints.gguf_parts import hub_parts
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError

# What a snapshot needs; never pickles, never code.
_SNAPSHOT_FILES = ("*.json", "*.safetensors", "*.jinja")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "*.jinja",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")


def is_hub_name(model: str) -> bool:
    """True if ``model`` may name a hub repository, or a .gguf file in one."""
    return bool(_HUB_FILE.fullmatch(model) or _HUB_ID.fullmatch(model))


def is_hub_id(name: str) -> bool:
    """True if ``name`` may name a hub repository."""
    return bool(_HUB_ID.fullmatch(name))


def download(model: str, config: EngineConfig, *, hint: str = "") -> Path:
    """The local folder of a hub repository, or the local .gguf file (a split one's first part).

    ``hint``: the end of the message where the hub cannot be reached.

    Raises:
        ModelLoadError: it is not there, or cannot be reached.
    """

    def download_all() -> str:
        if match := _HUB_FILE.fullmatch(model):
            first, *_ = [_download_file(match[1], file, config) for file in hub_parts(match[2])]
            return first
        dummy = config.load_format == "dummy"
        allow = [p for p in _SNAPSHOT_FILES if not (dummy and p == "*.safetensors")]
        return _download_snapshot(model, config.revision, allow, config)

    return _downloaded(model, download_all, hint)


def download_tokenizer(name: str, config: EngineConfig) -> Path:
    """The local folder of a hub repository's tokenizer, at ``config.tokenizer_revision``.

    Raises:
        ModelLoadError: it is not there, or cannot be reached.
    """
    revision = config.tokenizer_revision
    return _downloaded(
        name, lambda: _download_snapshot(name, revision, _TOKENIZER_FILES, config), ""
    )


def _downloaded(model: str, download: Callable[[], str], hint: str) -> Path:
    # Imported here: reading a local model must not cost this import.
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(download())
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{model}: not downloaded yet, and the hub cannot be reached "
            f"(offline?); name a local folder or .gguf file{hint}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelLoadError(f"{model}: cannot be downloaded: {reason}") from error


def _download_file(repository: str, file: str, config: EngineConfig) -> str:
    import huggingface_hub

    where: dict[str, Any] = {"revision": config.revision, "cache_dir": config.download_dir}
    where["token"] = config.hf_token
    return str(huggingface_hub.hf_hub_download(repository, file, **where))


def _download_snapshot(
    repository: str, revision: str | None, allow: Sequence[str], config: EngineConfig
) -> str:
    import huggingface_hub

    return str(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=config.download_dir,
            token=config.hf_token,
            allow_patterns=[*allow],
        )
    )
