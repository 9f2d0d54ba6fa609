"""W8Weight: 8-bit integers with scales of groups on a GPU, by the number of rows.

- up to MAX_SKINNY_ROWS: ``skinny_8bit``;
- beyond: dequantized, then cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats.format import PlaneMap
from ..formats.gguf_groups import eight_bit_groups
from ..weights import Planes
from .dequantize_8bit import dequantize_8bit
from .linear_quantized import QuantizedWeight
from .skinny_8bit import skinny_8bit
from .w4 import group_of

MAX_SKINNY_ROWS = 64


class W8Weight(QuantizedWeight):
    """q int8 [N, K]; scales [N], or [N, ceil(K / group)] in a float type of 16 or 32 bits."""

    __slots__ = ("_block", "q", "scales")

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, group: int) -> None:
        self.q, self.scales = q, scales
        self._block = (0, 0) if scales.ndim == 1 else (1, group)
        self.shape = (q.shape[0], q.shape[1])
        self.format = "INT8"
        self.nbytes = q.nbytes + scales.nbytes

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        if x.shape[0] > MAX_SKINNY_ROWS or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        skinny_8bit(
            x, None, self.q, self.scales, bias, y, scale_block=self._block, residual=residual
        )
        return True

    def floats(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_8bit(self.q, self.scales, dtype, self._block)

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        found, scales = self.q.index_select(0, ids).float(), self.scales.index_select(0, ids)
        if scales.ndim == 1:
            return found * scales.float()[:, None]
        columns = self.shape[1]
        return found * scales.float().repeat_interleave(self._block[1], 1)[:, :columns]


def prepare_w8(parts: Sequence[Planes], exact: bool) -> W8Weight | None:
    """The parts stacked along N; None if they have no form here, as those with zero points."""
    found = [_signed(part.in_order().planes) for part in parts]
    groups = [(q, scale) for q, scale in found if q is not None]
    return _stacked(groups) if len(groups) == len(found) else None


def prepare_gguf8(parts: Sequence[Planes], exact: bool) -> W8Weight | None:
    """Parts of one of GGUF's kinds of 8 bits, stacked along N."""
    return _stacked(
        [eight_bit_groups(part.format, part.in_order().planes["blocks"]) for part in parts]
    )


def _signed(planes: PlaneMap) -> tuple[torch.Tensor | None, torch.Tensor]:
    """q int8 and its scales [N, G] if all zero points are the middle of the integers."""
    q, scale, zero = planes["q"], planes["scale"], planes.get("zero")
    middle = 0 if q.dtype == torch.int8 else 128
    symmetric = middle == 0 if zero is None else bool((zero == middle).all())
    if not symmetric or "group" in planes or "codes" in planes:
        return None, scale
    return q if q.dtype == torch.int8 else (q ^ 128).view(torch.int8), scale


def _stacked(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> W8Weight | None:
    k = parts[0][0].shape[1]
    q = torch.cat([part for part, _ in parts])
    if all(scale.shape[1] == 1 for _, scale in parts):
        return W8Weight(q, torch.cat([scale[:, 0].float() for _, scale in parts]), 0)
    sizes = [k // scale.shape[1] for _, scale in parts]
    group = min(group_of(size) or 0 for size in sizes)
    if not group:
        return None
    types = {scale.dtype for _, scale in parts}
    dtype = types.pop() if len(types) == 1 else torch.float32
    scales = [
        scale.to(dtype).repeat_interleave(size // group, 1)
        for (_, scale), size in zip(parts, sizes, strict=True)
    ]
    return W8Weight(q, torch.cat(scales).contiguous(), group)
