"""Files of a split GGUF checkpoint, as llama.cpp numbers them, found by any of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from octavo._core import GgufFile
from octavo.errors import ModelLoadError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The names of all parts of the checkpoint that a file of this name belongs to, in order.

    Just ``name`` where it is not a part's.
    """
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    prefix, count = match[1], int(match[3])
    return [f"{prefix}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def gguf_parts(path: Path) -> list[Path]:
    """All files of the checkpoint that ``path`` is one of, in order.

    Raises:
        ModelLoadError: one is missing; the message names it.
    """
    parts = [path.with_name(name) for name in part_names(path.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelLoadError(f"{path}: part {missing[0]} of this split model is missing{more}")
    return parts


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """One path for each checkpoint among GGUF files of a folder: its first part's, sorted."""
    return sorted({path.with_name(part_names(path.name)[0]) for path in paths})


def open_gguf(path: Path) -> GgufFile:
    """The checkpoint that ``path`` is one file of, mapped.

    Raises:
        ModelLoadError: a part is missing, or what the parser refuses.
    """
    try:
        return GgufFile(*map(str, gguf_parts(path)))
    except (ValueError, OSError) as error:
        raise error if isinstance(error, ModelLoadError) else ModelLoadError(str(error)) from error


def hub_parts(file: str) -> list[str]:
    """``part_names`` of a file in a hub repository, folder included."""
    path = PurePosixPath(file)
    return [str(path.with_name(name)) for name in part_names(path.name)]
