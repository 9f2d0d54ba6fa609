"""Free memory of the host."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpu_bytes() -> int:
    """Memory that can be allocated without swapping: the host's, or the rest of its container's."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Linux tells more; elsewhere all memory is taken for free.
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and current.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(current.read_text()))
    return max(available, 0)
