"""Memory bandwidth, measured: what bounds the speed of one stream."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

# Larger than any cache; small enough to be touched within a second.
_CPU_BYTES: Final = 512 << 20
_GPU_BYTES: Final = 1 << 30
# The best of these: others' work only ever slows one down.
_REPEATS: Final = 5


def cpu_bandwidth(available_bytes: int) -> float:
    """Bytes a second that all allowed cores read together.

    Args:
        available_bytes: of memory; an eighth of it is used at most.
    """
    import torch

    size = max(1 << 20, min(_CPU_BYTES, available_bytes // 8))
    data = torch.ones(size // 4, dtype=torch.float32)
    data.sum()
    return max(data.nbytes / _seconds(data) for _ in range(_REPEATS))


def _seconds(data: torch.Tensor) -> float:
    began = time.perf_counter()
    data.sum()
    return time.perf_counter() - began


def gpu_bandwidth(device: torch.device) -> float:
    """Bytes a second that a GPU reads and writes in a copy within its memory."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    size = min(_GPU_BYTES, free // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = float("inf")
    for _ in range(_REPEATS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * size / best
