"""W4Weight: 4-bit integers with scales of groups on a GPU, by the number of rows.

- one row: ``gemv_w4``, with the norm before it and the gate or the residual after it;
- up to MAX_SKINNY_ROWS, of many outputs MAX_ROWS_OF_MANY: ``skinny_w4``;
- beyond: dequantized, then cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..formats.format import PlaneMap
from ..formats.gguf_groups import four_bit_groups
from ..weights import Norm, Planes
from . import gemv_w4
from .dequantize_w4 import dequantize_w4
from .linear_quantized import QuantizedWeight
from .skinny_w4 import skinny_w4
from .w4 import E2M1, W4, group_of, pack, unpack

# bench/gpu_products.py --kinds w4 --sweep; bench/results/h200-quantized.md.
MAX_SKINNY_ROWS = 128
# With weights of so many rows.
MANY_OUTPUTS, MAX_ROWS_OF_MANY = 16384, 256
# float16's normal numbers, between which a float32 scale loses no more than its last bits.
_HALF_RANGE = (2.0**-14, 65504.0)


class W4Weight(QuantizedWeight):
    """A W4 and the order of its columns (int64 [K]; None: their own)."""

    __slots__ = ("_one_row", "order", "w4")

    def __init__(self, weight: W4, order: torch.Tensor | None = None) -> None:
        self.w4, self.order = weight, order
        self._one_row = order is None and gemv_w4.takes(weight)
        self.shape = weight.shape
        self.format = "INT4"
        self.nbytes = weight.nbytes

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        rows = x.shape[0]
        most = MAX_ROWS_OF_MANY if self.shape[0] >= MANY_OUTPUTS else MAX_SKINNY_ROWS
        if rows > most or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        if self.order is not None:
            x = x.index_select(1, self.order)
        skinny_w4(x, self.w4, bias, y, residual=residual)
        return True

    def whole_row(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: Norm | None,
        gate: str,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        if not self._one_row or x.dtype not in (torch.bfloat16, torch.float16):
            return False
        gemv_w4.gemv_w4(x, self.w4, bias, y, norm=norm, gate=gate, residual=residual)
        return True

    def adds_residual(self, rows: int) -> bool:
        return rows == 1 and self._one_row

    def floats(self, dtype: torch.dtype) -> torch.Tensor:
        return self._ordered(dequantize_w4(self.w4, dtype))

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.w4
        zeros = None if weight.zeros is None else weight.zeros.index_select(0, ids)
        rows = replace(
            weight,
            words=weight.words.index_select(0, ids),
            scales=weight.scales.index_select(0, ids),
            zeros=zeros,
            shape=(ids.numel(), self.shape[1]),
        )
        return self._ordered(unpack(rows))

    def _ordered(self, values: torch.Tensor) -> torch.Tensor:
        """Columns as they were before they were sorted."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)


def prepare_w4(parts: Sequence[Planes], exact: bool) -> W4Weight | None:
    """The parts stacked along N; None if they have no form here.

    Columns whose groups are in no order are sorted by them, if all groups are of one size.
    """
    found = [part.in_order().planes for part in parts]
    all_codes = {_codes(planes) for planes in found}
    if len(all_codes) > 1:
        return None
    codes = all_codes.pop()
    if codes is not None and len(codes) != len(E2M1):
        return None
    e2m1 = codes == E2M1
    maps = [planes.get("group") for planes in found]
    first = maps[0]
    if not all(_same(group, first) for group in maps):
        return None
    k = parts[0].shape[1]
    order = None
    if first is not None:
        groups = found[0]["scale"].shape[1]
        counts = torch.bincount(first, minlength=groups)
        if k % groups or not bool((counts == k // groups).all()):
            return None
        order = first.argsort(stable=True)
    sizes = [group_of(k // planes["scale"].shape[1]) for planes in found]
    if any(size is None for size in sizes):
        return None
    group = min(size for size in sizes if size is not None)
    has_zero = codes is None and not all(_is_symmetric(planes) for planes in found)
    packed = []
    for planes in found:
        q, zero = planes["q"], planes.get("zero")
        offset = 8 if q.dtype == torch.int8 else 0
        q = (q + offset).view(torch.uint8)
        if zero is None:
            zero = torch.zeros(planes["scale"].shape, dtype=torch.int16, device=q.device)
        if order is not None:
            q = q.index_select(1, order)
        zeros = zero.to(torch.int16) + offset if has_zero else None
        made = pack(q.contiguous(), _half_scales(planes["scale"]), zeros, group)
        packed.append(replace(made, e2m1=e2m1, codes=None if e2m1 else codes))
    return W4Weight(_stacked(packed), order)


def prepare_gguf(parts: Sequence[Planes], exact: bool) -> W4Weight | None:
    """Parts of one of GGUF's kinds of 4 bits, stacked along N.

    Q4_K's scales, products of two in the file, are rounded to 16 bits.
    """
    packed = []
    for part in parts:
        groups = four_bit_groups(part.format, part.in_order().planes["blocks"])
        offset = groups.offset
        if offset is None:
            packed.append(pack(groups.q, groups.scale.half(), None, 32))
            continue
        both = _half_scales(torch.stack([groups.scale, offset]))
        packed.append(pack(groups.q, both[0], both[1], 32))
    return W4Weight(_stacked(packed))


def _codes(planes: PlaneMap) -> tuple[float, ...] | None:
    """The numbers that elements stand for, where these are no integers."""
    codes = planes.get("codes")
    return None if codes is None else tuple(codes.tolist())


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _is_symmetric(planes: PlaneMap) -> bool:
    """True if all zero points are the middle of the integers."""
    middle = 0 if planes["q"].dtype == torch.int8 else 8
    zero = planes.get("zero")
    return middle == 0 if zero is None else bool((zero == middle).all())


def _half_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales in 16 bits: as they are, or of float32 in the type that keeps more of them."""
    if scale.dtype != torch.float32:
        return scale
    used = scale.abs()[scale != 0]
    low, high = _HALF_RANGE
    fits = not used.numel() or bool((used.min() >= low) & (used.max() <= high))
    return scale.to(torch.float16 if fits else torch.bfloat16)


def _stacked(parts: Sequence[W4]) -> W4:
    if len(parts) == 1:
        return parts[0]
    types = {part.scales.dtype for part in parts}
    scales = torch.cat([part.scales.to(min(types, key=str)) for part in parts])
    zeros = [part.zeros for part in parts if part.zeros is not None]
    if zeros and zeros[0].is_floating_point():
        zeros = [zero.to(scales.dtype) for zero in zeros]
    return replace(
        parts[0],
        words=torch.cat([part.words for part in parts]),
        scales=scales,
        zeros=torch.cat(zeros) if zeros else None,
        shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
    )
