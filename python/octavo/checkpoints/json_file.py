"""Small JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelLoadError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelLoadError: it is not there, or is none; the message names the file.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file}: not a JSON object")
    return value


def read_json_if_there(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file. Raises as ``read_json``."""
    return read_json(file) if file.is_file() else {}
