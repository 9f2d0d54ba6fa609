"""Environment: what a measured figure depends on besides the code: machine, versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = ("octavo", "torch", "triton", "transformers", "numpy", "uvicorn", "uvloop")
_SECRETS = ("--api-key",)


def _output(*command: str) -> str | None:
    """A program's output, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _field(path: str, name: str) -> str | None:
    """The first ``name : value`` of a /proc file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ; None for an installed package."""
    folder = str(Path(__file__).parent)
    head = _output("git", "-C", folder, "rev-parse", "--short=10", "HEAD")
    if head is None:
        return None
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter to speed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """One line: processor, cores this process may use, memory, GPUs."""
    processor = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    parts = [processor, f"{len(os.sched_getaffinity(0))} cores"]
    memory = _field("/proc/meminfo", "MemTotal")
    if memory:
        parts.append(f"{int(memory.split()[0]) / 2**20:.0f} GiB")
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if gpus:
        parts.append("; ".join(gpus.splitlines()))
    return ", ".join(parts)


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as a person would repeat it, secrets blanked."""
    words: list[str] = []
    for word in sys.orig_argv if argv is None else argv:
        name = word.partition("=")[0]
        if words and words[-1] in _SECRETS:
            word = "***"
        elif name in _SECRETS and "=" in word:
            word = f"{name}=***"
        words.append(word)
    if words:
        words[0] = Path(words[0]).name
    return shlex.join(words)


def describe() -> dict[str, Any]:
    """All of it, for a results file."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
