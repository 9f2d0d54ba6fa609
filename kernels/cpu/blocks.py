"""Weights of safetensors files as rows of blocks, which the Rust core packs as it does GGUF's.

A block has a float32 factor (FP4_16: one for each half), for integers a zero point, and a byte for
each element (``rust_core/formats``, ``kinds.rs``). The core keeps 4 bits of those of 4 and fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.gguf import E2M1
from ..formats.grouped import GROUPED_FORMATS
from ..weights import Planes

_GROUP = 32
# Elements of a large block, where groups are as long: a factor each costs a quarter of a bit.
_LONG = 128
_NF4_BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Factors of FP8 are multiplied by 2^120 before they meet elements.
_MAX_FP8_FACTOR = 128.0


class Rows(NamedTuple):
    """Rows of blocks: uint8 [N, bytes], the Rust core's name of their kind."""

    blocks: Tensor
    kind: str


class _Groups(NamedTuple):
    """q [N, K], scale float32 [N, K / size] and zero as it, or None, of runs of columns."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    size: int


def column_order(weight: Planes) -> Tensor | None:
    """int64 [K]: the columns of a grouped weight, group by group; None where they are in order.

    GPTQ's activation order scatters the groups.
    """
    group = weight.planes.get("group")
    if weight.format not in GROUPED_FORMATS or group is None:
        return None
    order = group.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order


def as_rows(weight: Planes, columns: Tensor | None) -> Rows | None:
    """A grouped weight's rows of blocks, their columns in the given order.

    None: its groups are not runs of whole blocks in that order, or its numbers none of a kind's.
    """
    groups = _groups(weight, columns)
    if groups is None:
        return None
    if weight.format.startswith("INT"):
        return _integers(groups, int(weight.format[3:]))
    if weight.format == "FP8":
        return _fp8(groups)
    codes = weight.planes["codes"].tolist()
    if weight.format == "FP4" and [2 * code for code in codes] == list(E2M1):
        return _fp4(groups)
    if (
        weight.format == "NF4"
        and groups.size % _NF4_BLOCK == 0
        and torch.equal(weight.planes["codes"], torch.tensor(NF4))
    ):
        return Rows(_blocks(groups, _NF4_BLOCK, groups.q), "NF4_64")
    return None


def _groups(weight: Planes, columns: Tensor | None) -> _Groups | None:
    planes, k = weight.planes, weight.shape[1]
    scale, zero, q = planes["scale"].float(), planes.get("zero"), planes["q"]
    group = planes.get("group")
    if not k or (group is None and columns is not None):
        return None
    if group is None:
        return _Groups(q, scale, zero, k // scale.shape[1])
    if columns is not None:
        group, q = group[columns], q[:, columns]
    for size in (_LONG, _GROUP, _GROUP // 2):
        if k % size == 0 and bool((group == group[::size].repeat_interleave(size)).all()):
            firsts = group[::size]
            return _Groups(q, scale[:, firsts], None if zero is None else zero[:, firsts], size)
    return None


def _blocks(groups: _Groups, block: int, elements: Tensor, zero: Tensor | None = None) -> Tensor:
    """uint8 [N, bytes]: blocks of a factor, a zero point if there are any, and the elements."""
    n, k = elements.shape
    head = 4 if zero is None else 5
    out = torch.empty((n, k // block, head + block), dtype=torch.uint8)
    repeat = groups.size // block
    scale = groups.scale.repeat_interleave(repeat, 1) if repeat > 1 else groups.scale
    out[:, :, :4] = scale.contiguous().flatten().view(torch.uint8).view(n, -1, 4)
    if zero is not None:
        out[:, :, 4] = zero.repeat_interleave(repeat, 1) if repeat > 1 else zero
    out[:, :, head:] = elements.view(torch.uint8).view(n, -1, block)
    return out.flatten(1)


def _block(groups: _Groups) -> int | None:
    for block in (_LONG, _GROUP):
        if groups.size % block == 0:
            return block
    return None


def _integers(groups: _Groups, bits: int) -> Rows | None:
    block = _block(groups)
    if block is None:
        return None
    q, zero = groups.q, groups.zero
    if zero is None:
        zero = torch.zeros(groups.scale.shape, dtype=torch.int16)
    # Of 8 bits both around zero, of fewer both from zero on.
    if bits == 8:
        raised = -128 if q.dtype == torch.uint8 else 0
    else:
        raised = 1 << bits - 1 if q.dtype == torch.int8 else 0
    zero = zero.to(torch.int16) + raised
    low, high = (-128, 127) if bits == 8 else (0, 255)
    if not low <= int(zero.min()) <= int(zero.max()) <= high:
        return None
    if raised:
        q = (q.view(torch.uint8) + raised % 256).to(torch.uint8)
    kind = f"INT{8 if bits == 8 else 4}_{block}"
    return Rows(_blocks(groups, block, q, zero.to(torch.uint8)), kind)


def _fp8(groups: _Groups) -> Rows | None:
    block = _block(groups)
    if block is None or groups.q.dtype != torch.float8_e4m3fn:
        return None
    is_nan = (groups.q.view(torch.uint8) & 0x7F == 0x7F).any()
    if is_nan or not bool((groups.scale.abs() < _MAX_FP8_FACTOR).all()):
        return None
    return Rows(_blocks(groups, block, groups.q), f"FP8_{block}")


def _fp4(groups: _Groups) -> Rows | None:
    n, k = groups.q.shape
    if groups.size % _GROUP == 0:
        mantissa, exponent = torch.frexp(groups.scale)
        # A power of two is half of the next one; MXFP4's exponents are of what doubles e2m1.
        biased = exponent + 126
        if bool((mantissa == 0.5).all()) and 2 <= int(biased.min()) <= int(biased.max()) <= 254:
            return Rows(_mxfp4(groups, biased), "MXFP4")
    half = _GROUP // 2
    if groups.size % half or k % _GROUP:
        return None
    scale = groups.scale.repeat_interleave(groups.size // half, 1)
    out = torch.empty((n, k // _GROUP, 8 + _GROUP), dtype=torch.uint8)
    # Elements are twice e2m1's.
    out[:, :, :8] = (scale / 2).flatten().view(torch.uint8).view(n, -1, 8)
    out[:, :, 8:] = groups.q.view(n, -1, _GROUP)
    return Rows(out.flatten(1), "FP4_16")


def _mxfp4(groups: _Groups, biased: Tensor) -> Tensor:
    """GGUF's blocks: the exponent, then elements i and i + 16 in a byte."""
    n, k = groups.q.shape
    q = groups.q.view(n, k // _GROUP, 2, _GROUP // 2)
    exponents = biased.repeat_interleave(groups.size // _GROUP, 1)[:, :, None].to(torch.uint8)
    return torch.cat([exponents, q[:, :, 0] | q[:, :, 1] << 4], 2).flatten(1)
