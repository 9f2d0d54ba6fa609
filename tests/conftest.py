"""Shared by all tests: helpers beside this file are modules, and Triton interprets without a GPU."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Triton decides at the import of a kernel, and whichever file is collected first may import some.
# Told by the device files: torch, which would tell too, takes a second to import.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """A name that is the same in every process that collects: compressed bytes hold the time.

    The workers of a parallel run compare their lists, and none runs where two differ.
    """
    return argname if isinstance(val, bytes | bytearray) else None


def pytest_configure() -> None:
    """No deadline for hypothesis: on a machine that is loaded any example may take seconds."""
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        settings.register_profile("octavo", deadline=None)
        settings.load_profile("octavo")
