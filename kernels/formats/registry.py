"""Every format by its name. A new one is a file here and a line below."""

from __future__ import annotations

from .format import Format
from .gguf import BLOCK_FORMATS
from .grouped import GROUPED_FORMATS

FORMATS: dict[str, Format] = {**BLOCK_FORMATS, **GROUPED_FORMATS}


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    found = FORMATS.get(name)
    if found is None:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return found
