"""gemv_w4: one row times a weight of 4 bits an element, by plain fused multiply-adds.

Words and scales: ``w4``. An element is cut out of its word by a mask alone, with the exponent of a
float32 put over it, wherever its bits may stay where they are; two shifts serve all eight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options
from .prefetch import prefetch_lines
from .w4 import W4


class GemvW4Config(NamedTuple):
    """Tile of gemv_w4_kernel: weight rows, chunks of four groups along K, warps, loads ahead."""

    block_n: int
    chunks: int
    num_warps: int
    num_stages: int


@triton.jit
def scale_of(packed, j: tl.constexpr, scales):
    """The j-th of four 16-bit floats, as float32; ``scales``: a pointer of their type."""
    if scales.dtype.element_ty == tl.bfloat16 and j % 2 == 1:
        half = (packed >> (16 * j - 16)).to(tl.int32)
        return (half & -65536).to(tl.float32, bitcast=True)
    bits = (packed >> (16 * j)).to(tl.int16)
    return bits.to(scales.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def gemv_w4_kernel(
    x,  # [1, K]
    words,  # [N, W] int32
    scales,  # [N, 4 chunks]
    zeros,  # as scales: zero points, or what is added
    bias,  # [N]
    residual,  # [1, N]
    y,  # [1, N]
    N,
    K,
    NUM_CHUNKS,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZERO: tl.constexpr,  # "" for 8, "zero", "add"
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,  # no chunk is cut
    STAGES: tl.constexpr,
    LINES: tl.constexpr,  # of 128 bytes, prefetched of each row
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    # 8 is taken off with the exponents' powers of two, a zero point on its own.
    MIDDLE: tl.constexpr = 8.0 if ZERO == "" else (16.0 if ZERO == "zero" else 0.0)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the weight's compute the last one again.
    n = tl.minimum(rows, N - 1)[:, None, None].to(tl.int64)
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    c = tl.arange(0, PAIRS)[None, None, :]
    tiles = words + n * (NUM_CHUNKS * PAIRS) + chunk * PAIRS + c
    # Four scales are one load.
    four_scales = scales.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS + chunk
    four_zeros = zeros.to(tl.pointer_type(tl.int64)) + n * NUM_CHUNKS + chunk
    pairs = x.to(tl.pointer_type(tl.int32)) + chunk * (4 * PAIRS) + c
    X: tl.constexpr = x.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Weights are written by no kernel: the first may be on their way before the wait.
        lines = tl.arange(0, LINES)[None, :] * 32
        first = words + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * (NUM_CHUNKS * PAIRS)
        prefetch_lines(first + tl.minimum(lines, (NUM_CHUNKS - 1) * PAIRS))
        tl.extra.cuda.gdc_wait()
    # Opaque to the assembler, which would otherwise load it into a register for each use.
    exponent = 0x41800000 + tl.program_id(1)
    acc = tl.zeros([BLOCK_N, CHUNKS, PAIRS], dtype=tl.float32)
    for k in tl.range(0, NUM_CHUNKS, CHUNKS, num_stages=STAGES):
        if EVEN:
            w = tl.load(tiles + k * PAIRS, eviction_policy="evict_first")
            scale4 = tl.load(four_scales + k)
            zero4 = tl.load(four_zeros + k) if ZERO != "" else scale4
        else:
            here = k + chunk < NUM_CHUNKS
            w = tl.load(tiles + k * PAIRS, mask=here, other=0, eviction_policy="evict_first")
            scale4 = tl.load(four_scales + k, mask=here, other=0)
            zero4 = tl.load(four_zeros + k, mask=here, other=0) if ZERO != "" else scale4
        right = w >> 9
        left = w << 11
        for j in tl.static_range(4):
            at = k * (4 * PAIRS) + j * PAIRS
            if EVEN:
                xx = tl.load(pairs + at)
            else:
                xx = tl.load(pairs + at, mask=at + chunk * (4 * PAIRS) + c < K // 2, other=0)
            if tl.bfloat16 == X:
                x0 = (xx << 16).to(tl.float32, bitcast=True)
                x1 = (xx & -65536).to(tl.float32, bitcast=True)
            else:
                x0 = xx.to(tl.int16).to(X, bitcast=True).to(tl.float32)
                x1 = (xx >> 16).to(tl.int16).to(X, bitcast=True).to(tl.float32)
            # Bits 4 j .. of the word, and 16 + 4 j ..: each a float32 of 16 + q / f, where f is
            # multiplied into the activation. Products with 16 and with 8 f are taken off again.
            if j == 0:
                low, f0 = left & 0x00007800, 256.0
                high, f1 = w & 0x000F0000, 8.0
            elif j == 1:
                low, f0 = left & 0x00078000, 16.0
                high, f1 = right & 0x00007800, 256.0
            elif j == 2:
                low, f0 = left & 0x00780000, 1.0
                high, f1 = right & 0x00078000, 16.0
            else:
                low, f0 = w & 0x0000F000, 128.0
                high, f1 = right & 0x00780000, 1.0
            part = (low | exponent).to(tl.float32, bitcast=True) * (f0 * x0)
            part -= (16.0 * f0 + MIDDLE) * x0 + (16.0 * f1 + MIDDLE) * x1
            part += (high | exponent).to(tl.float32, bitcast=True) * (f1 * x1)
            if ZERO == "zero":
                less = ((zero4 >> (16 * j)).to(tl.int32) & 0xFFFF) | 0x4B000000
                # 2^23 + 16 less the zero point, as the sum with a float of so few bits is exact.
                part += (less.to(tl.float32, bitcast=True) - 8388608.0) * (x0 + x1)
            acc += scale_of(scale4, j, scales) * part
            if ZERO == "add":
                acc += scale_of(zero4, j, zeros) * (x0 + x1)
    out = tl.sum(tl.sum(acc, 2), 1)
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=rows < N)


def gemv_w4(
    x: torch.Tensor,
    weight: W4,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: GemvW4Config | None = None,
) -> torch.Tensor:
    """One row: x [1, K] -> y [1, N], filled and returned."""
    n, k = weight.shape
    chunks, group = weight.chunks, weight.group
    config = config or plan_gemv_w4(n, k, group)
    gemv_w4_kernel[(cdiv(n, config.block_n),)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        bias if bias is not None else x,
        residual if residual is not None else x,
        y,
        n,
        k,
        chunks,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO=weight.zero,
        GROUP=group,
        BLOCK_N=config.block_n,
        CHUNKS=config.chunks,
        EVEN=chunks % config.chunks == 0 and k == chunks * 4 * group,
        STAGES=config.num_stages,
        LINES=min(config.num_stages * config.chunks * group // 64, 16) or 1,
        num_warps=config.num_warps,
        num_stages=1,
        **pdl_options(),
    )
    return y


def plan_gemv_w4(n: int, k: int, group: int) -> GemvW4Config:
    """The tile of one row times an [n, k] weight."""
    return GemvW4Config(32, 128 // group, 4, 4)
