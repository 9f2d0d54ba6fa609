"""first_module: where the model itself lies in a sentence-transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from octavo.errors import ModelLoadError


class FirstModule(NamedTuple):
    """``kind``: its class, as "Transformer" or "StaticEmbedding". ``folder``: of its files."""

    kind: str
    folder: Path


def first_module(folder: Path) -> FirstModule | None:
    """The first module of a folder's modules.json; None where there is no such file.

    Raises:
        ModelLoadError: the file is no list of modules, or the module is outside the folder.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    try:
        module = json.loads(file.read_bytes())[0]
        kind, where = str(module["type"]).rpartition(".")[2], folder / str(module["path"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelLoadError(f"{file}: not a list of modules: {error!r}") from error
    if not where.resolve().is_relative_to(folder.resolve()):
        raise ModelLoadError(f"{file}: module {str(module['path'])!r} is outside the folder")
    return FirstModule(kind, where)
