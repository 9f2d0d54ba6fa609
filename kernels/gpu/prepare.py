"""prepare: a checkpoint's parts as one weight of a GPU, quantized where there are kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..formats.gguf_groups import EIGHT_BITS, FOUR_BITS
from ..reference import stack_dense
from ..weights import Planes, Stored, Weight, stacked_shape
from .linear import GpuWeight
from .linear_fp8 import prepare_fp8
from .linear_w4 import prepare_gguf, prepare_w4
from .linear_w8 import prepare_gguf8, prepare_w8

# A format -> the weight of such parts; None for parts that it has no form for.
_FORMS: dict[str, Callable[[Sequence[Planes], bool], Weight | None]] = {
    "FP8": prepare_fp8,
    "FP4": prepare_w4,
    "INT4": prepare_w4,
    "INT8": prepare_w8,
    "NF4": prepare_w4,
    **dict.fromkeys(FOUR_BITS, prepare_gguf),
    **dict.fromkeys(EIGHT_BITS, prepare_gguf8),
}
# Of activations that kernels for quantized weights take; float32 is for exact arithmetic.
_HALVES = (torch.bfloat16, torch.float16)


def prepare(parts: Sequence[Stored], *, exact: bool = False) -> Weight:
    """One weight [N, K] of its parts, stacked along N.

    Parts of one quantized format stay quantized, if their dtype is of 16 bits. Others become dense
    in their planes' dtype.

    exact: quantized weights meet float activations.

    Raises:
        ValueError: parts that do not stack.
    """
    stacked_shape(parts)
    planes = [part for part in parts if isinstance(part, Planes)]
    if len(planes) == len(parts) and len({part.format for part in planes}) == 1:
        form = _FORMS.get(planes[0].format)
        if form is not None and planes[0].dtype in _HALVES and planes[0].shape[1]:
            weight = form(planes, exact)
            if weight is not None:
                return weight
    return GpuWeight(stack_dense(parts).contiguous())
