"""A test file once more, in a process whose CPU kernels use another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from octavo import _core
from octavo.kernels.cpu import ops as cpu

OTHER_LEVELS = [name for name in _core.cpu_levels() if name != cpu.level()]


def run_at_level(file: str, level: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest of the file with ``options``; skips where this process is such a one already."""
    if os.environ.get("OCTAVO_CPU_LEVEL"):
        pytest.skip("already a child")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file],
        env={**os.environ, "OCTAVO_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
