"""Shared by every kernel's launch: device checks, PDL, the counters of last arrivers.

The kernels of a shard run on one stream. They synchronize nothing with the host and allocate only
through torch.empty, so all of them can be captured into a CUDA graph; run each shape once eagerly
before capturing it, so that its kernel is compiled and the counters exist.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

# Split kernels count arrivals here: one int32 a tile, always zero between launches, because the
# last arriver resets its own. 64k tiles cover 1,024 requests x 64 KV heads.
NUM_COUNTERS = 65536

# Multiprocessors assumed under the interpreter: few, so that splits stay few.
INTERPRETED_SMS = 4

_pdl_enabled = False


def set_pdl(enabled: bool) -> None:
    """Turn programmatic dependent launch on or off for every later launch (Hopper and later).

    With it a kernel starts while its predecessor on the stream still drains; each kernel waits
    (``gdc_wait``) before it touches anything an earlier kernel wrote. Only weights, which no
    kernel writes, are read before the wait.
    """
    global _pdl_enabled
    _pdl_enabled = enabled


def pdl_options() -> dict[str, Any]:
    """The keyword arguments of a launch: the kernel's ``PDL`` flag and the launch attribute."""
    if _pdl_enabled:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def _num_sms(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; INTERPRETED_SMS for the CPU under the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return _num_sms(device.index if device.index is not None else torch.cuda.current_device())


# By device and stream: launches of two streams overlap.
_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Zeroed int32 [NUM_COUNTERS], shared by the split kernels of a device's current stream.

    Raises:
        ValueError: if a launch needs more than NUM_COUNTERS.
        RuntimeError: if they would have to be made inside a graph capture.
    """
    if count > NUM_COUNTERS:
        raise ValueError(f"a launch needs {count} tiles, at most {NUM_COUNTERS} are counted")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("run a step eagerly before capturing it: the counters do not exist")
        found = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not contiguous or not on one device.

    Raises:
        ValueError: naming the tensor.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")
        if device is None:
            device = tensor.device
            if device.type == "cpu" and not triton.knobs.runtime.interpret:
                raise ValueError(f"{name} is on the CPU: use kernels.cpu there")
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the others on {device}")


def check_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """Raises ValueError unless ``tensor`` has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
