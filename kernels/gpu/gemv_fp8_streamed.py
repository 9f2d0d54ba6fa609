"""gemv_fp8_streamed: one row times a weight of 8-bit floats, weights loaded far ahead.

Weights and activations meet as pairs of float16, two products and two additions an instruction:
activations times the power of two that makes the largest 4 to 8, so that eight of its products with
the largest weight are a float16. Sums of eight products are added as float32. The error is a
quarter of what rounding the result to bfloat16 costs (bench/gpu_products.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..weights import Norm
from .launch import next_power_of_2, pdl_options
from .streamed import StreamConfig, finish_rows, row_of, stretch_of


@triton.jit
def low_half(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high_half(pair):
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def pair_of(low, high):
    """Two float16 as one word."""
    bits = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _element(words, i: tl.constexpr):
    return (words >> (8 * i)).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def add_word(words, x01, x23, acc, ASM: tl.constexpr):
    """acc and the products of a word's four e4m3 with two pairs of float16, as a pair of sums."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; .reg .b32 p, q; mov.b32 {a, b}, $1;"
            " cvt.rn.f16x2.e4m3x2 p, a; cvt.rn.f16x2.e4m3x2 q, b;"
            " fma.rn.f16x2 p, p, $2, $4; fma.rn.f16x2 $0, q, $3, p; }",
            "=r,r,r,r,r",
            [words, x01, x23, acc],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low = low_half(acc).to(tl.float32) + _element(words, 0) * low_half(x01).to(tl.float32)
        high = high_half(acc).to(tl.float32) + _element(words, 1) * high_half(x01).to(tl.float32)
        low = low.to(tl.float16).to(tl.float32) + _element(words, 2) * low_half(x23)
        high = high.to(tl.float16).to(tl.float32) + _element(words, 3) * high_half(x23)
        return pair_of(low.to(tl.float16), high.to(tl.float16))


@triton.jit
def fourths(t):
    """Every fourth element of a tile's last axis, beginning with each of the first four."""
    HALF: tl.constexpr = t.shape[-1] // 4
    if len(t.shape) == 1:
        even, odd = tl.split(tl.reshape(t, (HALF, 2, 2)))
    else:
        even, odd = tl.split(tl.reshape(t, (t.shape[0], HALF, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def sums_of_rows(w, x01, x23, ASM: tl.constexpr):
    """Sums [N] of rows of words [N, W] times activations [W]; a thread adds up four words."""
    a, b, c, d = fourths(w)
    a01, b01, c01, d01 = fourths(x01)
    a23, b23, c23, d23 = fourths(x23)
    acc = add_word(a, a01[None, :], a23[None, :], a * 0, ASM)
    acc = add_word(b, b01[None, :], b23[None, :], acc, ASM)
    acc = add_word(c, c01[None, :], c23[None, :], acc, ASM)
    acc = add_word(d, d01[None, :], d23[None, :], acc, ASM)
    return tl.sum(low_half(acc).to(tl.float32) + high_half(acc).to(tl.float32), 1)


@triton.jit
def load_pairs(x, g, c, WORDS, weight_offset, HAS_NORM: tl.constexpr):
    """Activations as pairs of float16, times a power of two.

    Returns (of words' elements 0 and 1, of 2 and 3 [W], the value of 1, the sum of x's squares).
    """
    at = c[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = (c < WORDS)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    squares = 0.0
    if HAS_NORM:
        squares = tl.sum(tl.sum(value * value, 1), 0)
        value = value * (g.to(tl.float32) + weight_offset)
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    # Beyond these, numbers are of no consequence or none.
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 40), 250)
    unit = ((exponent - 2) << 23).to(tl.float32, bitcast=True)
    inverse = ((256 - exponent) << 23).to(tl.float32, bitcast=True)
    half = (value * inverse).to(tl.float16)
    even, odd = tl.split(tl.reshape(half, (c.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return pair_of(x0, x1), pair_of(x2, x3), unit, squares


@triton.jit
def gemv_fp8_streamed_kernel(
    x,  # [1, K]
    weight,  # [N, K / 4] int32, four e4m3 each
    scales,  # [N] float32
    bias,  # [N]
    residual,  # [1, OUT]
    norm_weight,  # [K]
    y,  # [1, OUT]
    N,
    WORDS,  # of a row
    ROWS,  # of a program
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation of the gate half
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # WORDS or more
    STEPS: tl.constexpr,  # of a program, or more
    EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    c = tl.arange(0, BLOCK_W)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    of_program = row_of(first + tl.arange(0, STEPS * BLOCK_N), N, GATE)
    scale = tl.load(scales + of_program)
    if HAS_BIAS:
        b = tl.load(bias + of_program)
    g = 0.0
    if HAS_NORM:
        fours = c[:, None] * 4 + tl.arange(0, 4)[None, :]
        g = tl.load(norm_weight + fours, mask=(c < WORDS)[:, None], other=0.0)
    x01 = tl.zeros([BLOCK_W], dtype=tl.int32)
    x23 = tl.zeros([BLOCK_W], dtype=tl.int32)
    unit = 1.0
    squares = 0.0
    added = tl.zeros([STEPS * BLOCK_N], dtype=tl.float32)
    steps = tl.arange(0, STEPS)[None, :]
    sums = tl.zeros([BLOCK_N, STEPS], dtype=tl.float32)
    for i in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        rows = row_of(i + tl.arange(0, BLOCK_N), N, GATE)
        tiles = weight + rows[:, None].to(tl.int64) * WORDS + c[None, :]
        if EVEN:
            w = tl.load(tiles, eviction_policy="evict_first")
        else:
            w = tl.load(tiles, mask=(c < WORDS)[None, :], other=0, eviction_policy="evict_first")
        if i == first:
            # Here, and not before the loop, so that the loads of all stages come first.
            if PDL:
                tl.extra.cuda.gdc_wait()
            x01, x23, unit, squares = load_pairs(x, g, c, WORDS, weight_offset, HAS_NORM)
            if HAS_RESIDUAL and GATE == "":
                at = first + tl.arange(0, STEPS * BLOCK_N)
                added = tl.load(residual + at, mask=at < last, other=0.0).to(tl.float32)
        of_rows = sums_of_rows(w, x01, x23, ASM)
        sums = tl.where(steps == (i - first) // BLOCK_N, of_rows[:, None], sums)
    if HAS_NORM:
        unit *= tl.rsqrt(squares / (WORDS * 4) + eps)
    in_order = tl.reshape(tl.trans(sums), (STEPS * BLOCK_N,)) * (unit * scale) + added
    if HAS_BIAS:
        in_order += b.to(tl.float32)
    finish_rows(in_order, first, last, residual, y, HAS_RESIDUAL and GATE != "", GATE)


def gemv_fp8_streamed(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    config: StreamConfig,
    residual: torch.Tensor | None = None,
    norm: Norm | None = None,
    gate: str = "",
) -> torch.Tensor:
    """One row: x [1, K] @ (weight [N, K] * scales).T -> y [1, N] (gated: [1, N / 2]).

    y is filled and returned. scales: [N]. K must be a multiple of 4.
    """
    n, k = weight.shape
    words = k // 4
    block_w = max(next_power_of_2(words), 4)
    stretch = stretch_of(n, config, bool(gate), x.device)
    gemv_fp8_streamed_kernel[(stretch.programs,)](
        x,
        weight.view(torch.int32),
        scales,
        bias if bias is not None else x,
        residual if residual is not None else x,
        norm.weight if norm is not None else x,
        y,
        n,
        words,
        stretch.rows,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None,
        GATE=gate,
        BLOCK_N=config.block_n,
        BLOCK_W=block_w,
        STEPS=stretch.steps,
        EVEN=block_w == words,
        NUM_STAGES=config.num_stages,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return y
