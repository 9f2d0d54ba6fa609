"""grouped_quantized: rows sorted by expert times the experts' weights of 4 or 8 bits.

As ``moe``'s kernel for floats, with the weight on the M side of the dot, as in ``skinny_w4`` and
``skinny_8bit``: an expert has few rows. All experts lie in one weight, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..weights import Planes, Stored
from .launch import cdiv, pdl_options
from .limits import shared_bytes
from .linear_fp8 import Fp8Weight
from .linear_w4 import W4Weight
from .prepare import prepare
from .skinny_8bit import widen
from .skinny_w4 import scale_of, unpack_group

BLOCK_N = 64
BLOCK_K = 128


class SortedRows(NamedTuple):
    """Rows by expert, of ``moe``: arguments of a kernel.

    slot_ids: [tiles * BLOCK_M]: which slot (token * top_k + choice) a row of a tile is.
    tile_experts: [tiles]; the number of experts: an unused tile. slot_weights: [slots] float32.
    """

    slot_ids: torch.Tensor
    tile_experts: torch.Tensor
    slot_weights: torch.Tensor
    num_slots: int
    num_experts: int


@triton.jit
def tile_of(rows, BLOCK_M: tl.constexpr, SLOTS_PER_ROW: tl.constexpr):
    """(expert, slots [BLOCK_M], those that are used, the rows of x that they read) of a tile."""
    expert = tl.load(rows.tile_experts + tl.program_id(0))
    slots = tl.load(rows.slot_ids + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    used = slots < rows.num_slots
    return expert, slots, used, (slots // SLOTS_PER_ROW).to(tl.int64)


@triton.jit
def store_tile(
    acc, y, bias, rows, expert, n, slots, used, N, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr
):
    """The expert's bias and the slots' weights; stores acc [BLOCK_N, BLOCK_M] into y [slots, N]."""
    if HAS_BIAS:
        of_expert = bias + expert.to(tl.int64) * N
        acc += tl.load(of_expert + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if WEIGHTED:
        acc *= tl.load(rows.slot_weights + slots, mask=used, other=0.0)[None, :]
    out = y + slots.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc.to(y.dtype.element_ty), mask=used[None, :] & (n < N)[:, None])


@triton.jit
def grouped_w4_kernel(
    x,  # [rows, K]
    words,  # [E N, W] int32
    scales,  # [E N, 4 chunks]
    zeros,  # as scales
    bias,  # [E, N]
    y,  # [slots, N]
    rows,  # SortedRows
    N,
    K,
    NUM_CHUNKS,
    SLOTS_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert, slots, used, source = tile_of(rows, BLOCK_M, SLOTS_PER_ROW)
    if expert < rows.num_experts:
        row = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
        tiles = words + row[:, None] * (NUM_CHUNKS * PAIRS) + tl.arange(0, PAIRS)[None, :]
        four_scales = scales.to(tl.pointer_type(tl.int64)) + row * NUM_CHUNKS
        four_zeros = zeros.to(tl.pointer_type(tl.int64)) + row * NUM_CHUNKS
        kk = tl.arange(0, GROUP)
        x_tiles = x + source[None, :] * K + kk[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for chunk in range(NUM_CHUNKS):
            w = tl.load(tiles + chunk * PAIRS)
            scale4 = tl.load(four_scales + chunk)
            zero4 = tl.load(four_zeros + chunk) if ZERO == "zero" or ZERO == "add" else scale4
            for j in tl.static_range(4):
                k = (chunk * 4 + j) * GROUP
                mask = used[None, :] & (k + kk < K)[:, None]
                xk = tl.load(x_tiles + k, mask=mask, other=0.0)
                a = unpack_group(w, zero4, j, x.dtype.element_ty, ZERO)
                acc += scale_of(scale4, j, scales)[:, None] * tl.dot(a, xk)
                if ZERO == "add":
                    ones = tl.full([BLOCK_N, GROUP], 1.0, x.dtype.element_ty)
                    acc += scale_of(zero4, j, zeros)[:, None] * tl.dot(ones, xk)
        store_tile(acc, y, bias, rows, expert, n, slots, used, N, HAS_BIAS, WEIGHTED)


@triton.jit
def grouped_fp8_kernel(
    x,  # [rows, K]
    weight,  # [E N, K] 8-bit floats
    scales,  # [E N], or [E N / 128, K_BLOCKS]: float32
    bias,  # [E, N]
    y,  # [slots, N]
    rows,  # SortedRows
    N,
    K,
    K_BLOCKS,
    SLOTS_PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCKED: tl.constexpr,  # scales of 128 x 128
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert, slots, used, source = tile_of(rows, BLOCK_M, SLOTS_PER_ROW)
    if expert < rows.num_experts:
        row = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
        kk = tl.arange(0, BLOCK_K)
        x_tiles = x + source[None, :] * K + kk[:, None]
        w_tiles = weight + row[:, None] * K + kk[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            in_k = k + kk < K
            w = tl.load(w_tiles + k, mask=in_k[None, :], other=0.0)
            xk = tl.load(x_tiles + k, mask=used[None, :] & in_k[:, None], other=0.0)
            if BLOCKED:
                scale = tl.load(scales + row // 128 * K_BLOCKS + k // 128)
                acc += scale[:, None] * tl.dot(widen(w, x), xk)
            else:
                acc = tl.dot(widen(w, x), xk, acc)
        if not BLOCKED:
            acc *= tl.load(scales + row)[:, None]
        store_tile(acc, y, bias, rows, expert, n, slots, used, N, HAS_BIAS, WEIGHTED)


def grouped_quantized(
    x: torch.Tensor,
    weight: W4Weight | Fp8Weight,
    bias: torch.Tensor | None,
    rows: SortedRows,
    *,
    slots_per_row: int,
    weighted: bool,
    block_m: int,
) -> torch.Tensor:
    """Each slot's row of x [rows, K] times its expert's part [N, K] of the weight: [slots, N].

    bias: [E, N]. slots_per_row: slots of one row of x. weighted: times the slots' weights.
    """
    n, k = weight.shape[0] // rows.num_experts, weight.shape[1]
    y = torch.empty((rows.num_slots, n), dtype=x.dtype, device=x.device)
    grid = (rows.tile_experts.numel(), cdiv(n, BLOCK_N))
    shared = {
        "SLOTS_PER_ROW": slots_per_row,
        "HAS_BIAS": bias is not None,
        "WEIGHTED": weighted,
        "BLOCK_M": block_m,
        "BLOCK_N": BLOCK_N,
        "num_warps": 4,
        "num_stages": _stages(weight, block_m, x.device),
        **pdl_options(),
    }
    at_bias = x if bias is None else bias
    if isinstance(weight, W4Weight):
        w4 = weight.w4
        zeros = w4.scales if w4.zeros is None else w4.zeros
        grouped_w4_kernel[grid](
            x, w4.words, w4.scales, zeros, at_bias, y, rows, n, k, w4.chunks,
            ZERO=w4.zero, GROUP=w4.group, **shared,
        )  # fmt: skip
    else:
        blocked = weight.scales.ndim == 2
        grouped_fp8_kernel[grid](
            x, weight.q, weight.scales, at_bias, y, rows, n, k,
            weight.scales.shape[1] if blocked else 0,
            BLOCKED=blocked, BLOCK_K=BLOCK_K, **shared,
        )  # fmt: skip
    return y


def _stages(weight: W4Weight | Fp8Weight, block_m: int, device: torch.device) -> int:
    """Steps whose loads are under way, of three as many as shared memory holds."""
    step = BLOCK_K * (BLOCK_N + 2 * block_m)
    if isinstance(weight, W4Weight):
        step = 2 * weight.w4.group * (BLOCK_N + 4 * block_m)
    return max(min(shared_bytes(device) // step, 3), 1)


def stack_experts(experts: Sequence[Sequence[Stored]]) -> W4Weight | Fp8Weight | None:
    """Each expert's parts, and all experts, one below the other; None if they have no form here."""
    parts = [part for of_expert in experts for part in of_expert]
    if not all(isinstance(part, Planes) for part in parts):
        return None
    heights = {sum(part.shape[0] for part in of_expert) for of_expert in experts}
    weight = prepare(parts)
    if len(heights) > 1 or not isinstance(weight, W4Weight | Fp8Weight):
        return None
    if isinstance(weight, W4Weight):
        return weight if weight.order is None and weight.w4.codes is None else None
    # A block of scales must not reach into the next expert.
    return weight if weight.scales.ndim == 1 or heights.pop() % 128 == 0 else None
