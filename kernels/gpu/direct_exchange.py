"""Kernels of an exchange outside of graphs: they read the ranks' tensors where they are.

The streams have waited for one another before, and do so again before a tensor is used anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .peers import ADDRESSES
from .waiting_exchange import normed_sum


@triton.jit
def _address(r: tl.constexpr, a0, a1, a2, a3, a4, a5, a6, a7):
    """The r-th of eight addresses."""
    addresses = (a0, a1, a2, a3, a4, a5, a6, a7)
    return addresses[r]


@triton.jit(do_not_specialize=[*ADDRESSES])
def direct_sum_kernel(
    residual,  # [M, H]: becomes the sum where there is a norm
    norm_weight,  # [H]
    y,  # [M, H]
    a0,  # the ranks' addends [M, H]: WORLD addresses
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    H,
    NUMEL,
    eps,
    weight_offset,
    HAS_NORM: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,  # >= H
):
    """A row a program, of addends that are there and stay there."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    at = row * H + cols
    mask = (cols < H) & (at < NUMEL)
    element: tl.constexpr = y.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(WORLD):
        address = _address(r, a0, a1, a2, a3, a4, a5, a6, a7)
        x = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
        # Another device's memory is not kept coherent in this one's caches.
        v = tl.load(x + at, mask=mask, other=0.0, cache_modifier=".cv")
        total += v.to(tl.float32)
    if HAS_NORM:
        total = normed_sum(
            total, residual, norm_weight, at, cols, mask, H, eps, weight_offset, element
        )
    tl.store(y + at, total.to(element), mask=mask)


@triton.jit(do_not_specialize=[*ADDRESSES])
def direct_gather_kernel(
    y,  # [M, N]: all ranks' columns
    a0,  # the ranks' columns: WORLD addresses
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    N,
    PIECES: tl.constexpr,  # of a row; the widest rank's
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # shares are whole numbers of it
):
    """A piece of every rank a program."""
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    cols = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    element: tl.constexpr = y.dtype.element_ty
    for r in tl.static_range(WORLD):
        begin = tl.multiple_of(N * r // WORLD, UNIT)
        width = tl.multiple_of(N * (r + 1) // WORLD - begin, UNIT)
        address = _address(r, a0, a1, a2, a3, a4, a5, a6, a7)
        x = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
        mask = cols < width
        v = tl.load(x + row * width + cols, mask=mask, other=0.0, cache_modifier=".cv")
        tl.store(y + row * N + begin + cols, v, mask=mask)
