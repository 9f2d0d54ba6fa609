"""Speed of foreign modules: norms in one kernel, and steps that a CUDA graph can hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
# Of weights that are added to one (Gemma's), and of those that stand for themselves.
_OFFSETS = (0.0, 1.0)
# How far the kernel may be from the module, relative: a few roundings.
_TOLERANCE = {torch.float32: 1e-5}
_HALF_TOLERANCE = 1e-2


def replace_norms(module: Any, ops: OpSet) -> int:
    """Have the op set's kernel compute each RMS norm that it computes alike; how many.

    A module's own norm is six small kernels. Whether a class named so is that norm is tried, on
    random rows, so that one with a gate, groups or other arithmetic stays as it is.
    """
    return sum(_replace_norm(child, ops) for child in module.modules())


def _replace_norm(norm: Any, ops: OpSet) -> bool:
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name)), None)
    if (
        "RMSNorm" not in type(norm).__name__
        or not isinstance(weight, Tensor)
        or weight.dim() != 1
        or not isinstance(eps, float)
        or len(inspect.signature(norm.forward).parameters) != 1
    ):
        return False
    own = norm.forward
    rows = torch.randn((3, len(weight)), device=weight.device).to(weight.dtype)
    tolerance = _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE)
    for offset in _OFFSETS:
        forward = functools.partial(_rms_norm, ops, own, weight, eps, offset)
        try:
            expected, found = own(rows).float(), forward(rows).float()
        except Exception:  # whatever it takes, it is not rows of this width
            return False
        if float((found - expected).norm()) <= tolerance * float(expected.norm()):
            norm.forward = forward
            return True
    return False


def _rms_norm(
    ops: OpSet,
    own: Callable[[Tensor], Tensor],
    weight: Tensor,
    eps: float,
    offset: float,
    x: Tensor,
) -> Tensor:
    if x.dtype != weight.dtype or x.shape[-1] != len(weight):
        return own(x)
    rows = x.reshape(-1, len(weight)).contiguous()
    found = ops.rms_norm(rows, weight, eps, weight_offset=offset)
    assert isinstance(found, Tensor)
    return found.view(x.shape)


def wait_of(step: Callable[[], object], device: torch.device) -> str | None:
    """The reason why no CUDA graph can hold ``step``, in torch's words; None if one can.

    Most often the host waits for a value. It is tried rather than looked for: some modules read
    values only while nothing is captured.
    """
    if device.type != "cuda":
        return None
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    generator = torch.cuda.default_generators[device.index or 0]
    numbers = generator.clone_state()
    reason: str | None = None
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Kernels are compiled at their first run, which a capture would not allow.
        step()
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        try:
            graph.capture_end()
        except RuntimeError as error:
            reason = reason or str(error).partition("\n")[0]
    if reason is not None:
        # A capture that failed leaves torch's random numbers waiting for its end.
        generator.graphsafe_set_state(numbers)
    return reason
