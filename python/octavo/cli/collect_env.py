"""collect_env: the machine and its software, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from octavo import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "numpy",
    "uvloop",
    "uvicorn",
    "httptools",
    "orjson",
    "jinja2",
    "prometheus-client",
)


def collect_env() -> str:
    """One ``name: value`` per line; no paths, no names of users or hosts."""
    rows = {
        "octavo": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory": _memory(),
    }
    for package in PACKAGES:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows.update(_gpus())
    width = max(map(len, rows))
    return "\n".join(f"{name + ':':<{width + 1}} {value}" for name, value in rows.items())


def usable_cores() -> str:
    """Cores that this process may use, of all."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return f"{len(affinity(0))} of {os.cpu_count()}" if affinity else str(os.cpu_count())


def cpu_name() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux: platform knows a little.
    return platform.processor() or "unknown"


def _memory() -> str:
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _gpus() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    rows = {"cuda": str(torch.version.cuda)}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        rows[f"gpu {index}"] = (
            f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return rows
