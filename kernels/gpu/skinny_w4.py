"""skinny_w4: a few rows times a weight of 4 bits an element, on the matrix units.

As ``skinny``, with elements made floats between memory and the units: 128 + q (1024 + q in
float16) is the mask of a word and the bits of that power of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gemv_w4 import scale_of
from .launch import block_rows, cdiv, counters, num_sms, pdl_options
from .skinny import finish_tile
from .w4 import W4


class SkinnyW4Config(NamedTuple):
    """Tile of skinny_w4_kernel: weight rows, parts of K, scales before or after the units."""

    block_n: int
    split_k: int
    num_warps: int
    num_stages: int
    scaled_first: bool


@triton.jit(do_not_specialize=["M"])
def skinny_w4_kernel(
    x,  # [M, K]
    words,  # [N, W] int32
    scales,  # [N, 4 chunks]
    zeros,  # as scales
    bias,  # [N]
    residual,  # [M, N]
    y,  # [M, N]
    partial,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_M] float32
    counters,  # [tiles] int32, zero
    M,
    N,
    K,
    NUM_CHUNKS,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    X: tl.constexpr = x.dtype.element_ty
    BITS: tl.constexpr = 0x43004300 if tl.bfloat16 == X else 0x64006400
    ONE: tl.constexpr = 128.0 if tl.bfloat16 == X else 1024.0
    MIDDLE: tl.constexpr = 8.0 if ZERO == "" else (16.0 if ZERO == "zero" else 0.0)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(rows, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    in_m = (m < M)[None, :]
    kk = tl.arange(0, GROUP)
    tiles = words + n[:, None] * (NUM_CHUNKS * PAIRS) + tl.arange(0, PAIRS)[None, :]
    four_scales = scales.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS
    four_zeros = zeros.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS
    x_tiles = x + m[None, :] * K + kk[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    per_part = tl.cdiv(NUM_CHUNKS, SPLIT_K)
    begin = tl.program_id(1) * per_part
    end = tl.minimum(begin + per_part, NUM_CHUNKS)
    # Scales are loaded a step ahead: nothing else hides their latency.
    first = tl.minimum(begin, NUM_CHUNKS - 1)
    scale4 = tl.load(four_scales + first)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for chunk in range(begin, end):
        w = tl.load(tiles + chunk * PAIRS, eviction_policy="evict_first")
        later = tl.minimum(chunk + 1, NUM_CHUNKS - 1)
        next_scale4 = tl.load(four_scales + later)
        if ZERO != "":
            zero4 = tl.load(four_zeros + chunk)
        for j in tl.static_range(4):
            k = (chunk * 4 + j) * GROUP
            if EVEN:
                xk = tl.load(x_tiles + k, mask=in_m, other=0.0)
            else:
                xk = tl.load(x_tiles + k, mask=in_m & (k + kk < K)[:, None], other=0.0)
            q = (w >> (4 * j)) & 0x000F000F
            if ZERO == "zero":
                # Less the zero point, plus 16, in the integers that both halves still are.
                less = ((zero4 >> (16 * j)).to(tl.int16).to(tl.int32) * 0x00010001) + BITS
                q = q + less[:, None]
            else:
                q = q | BITS
            low = q.to(tl.int16).to(X, bitcast=True)
            high = (q >> 16).to(tl.int16).to(X, bitcast=True)
            a = tl.reshape(tl.join(low, high), (BLOCK_N, GROUP)) - tl.full([1, 1], ONE + MIDDLE, X)
            scale = scale_of(scale4, j, scales)[:, None]
            if ZERO == "add":
                a = a.to(tl.float32) * scale + scale_of(zero4, j, zeros)[:, None]
                acc = tl.dot(a.to(X), xk, acc)
            elif SCALED_FIRST:
                acc = tl.dot(a * scale.to(X), xk, acc)
            else:
                acc += scale * tl.dot(a, xk)
        scale4 = next_scale4
    finish_tile(
        acc,
        bias,
        residual,
        y,
        partial,
        counters,
        M,
        N,
        HAS_BIAS,
        HAS_RESIDUAL,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
    )


def plan_skinny_w4(m: int, n: int, chunks: int, sms: int) -> SkinnyW4Config:
    """The tile of m rows times a weight of n rows and so many chunks a row."""
    split = 1
    while split < 8 and cdiv(n, 64) * split < 2 * sms and chunks >= 4 * split:
        split *= 2
    return SkinnyW4Config(64, split, 4, 2, scaled_first=False)


def skinny_w4(
    x: torch.Tensor,
    weight: W4,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: SkinnyW4Config | None = None,
) -> torch.Tensor:
    """residual + x [M, K] @ weight.T + bias -> y [M, N], filled and returned."""
    m, k = x.shape
    n, chunks, group = weight.shape[0], weight.chunks, weight.group
    config = config or plan_skinny_w4(m, n, chunks, num_sms(x.device))
    tiles = cdiv(n, config.block_n)
    block_m = block_rows(m)
    if config.split_k > 1:
        partial = torch.empty(
            config.split_k * tiles * config.block_n * block_m, dtype=torch.float32, device=x.device
        )
        counts = counters(x.device, tiles)
    else:
        partial = counts = y
    skinny_w4_kernel[(tiles, config.split_k)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        bias if bias is not None else x,
        residual if residual is not None else x,
        y,
        partial,
        counts,
        m,
        n,
        k,
        chunks,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO=weight.zero,
        GROUP=group,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        SPLIT_K=config.split_k,
        SCALED_FIRST=config.scaled_first,
        EVEN=k == chunks * 4 * group,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y
