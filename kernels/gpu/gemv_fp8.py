"""gemv_fp8: one row times a weight of 8-bit floats, by plain fused multiply-adds.

Four elements are one word, made floats by two instructions of the kind that converts pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options


class GemvFp8Config(NamedTuple):
    """Tile of gemv_fp8_kernel: weight rows, words of four elements along K, and its warps."""

    block_n: int
    words: int
    num_warps: int


@triton.jit
def _halves(words, ASM: tl.constexpr):
    """The four e4m3 of each word as two words of two float16 each: elements 0, 1 and 2, 3."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
            "=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return _half(words, 0) | (_half(words, 8) << 16), _half(words, 16) | (
            _half(words, 24) << 16
        )


@triton.jit
def _half(words, shift: tl.constexpr):
    """One e4m3 of each word as the bits of a float16."""
    value = (words >> shift).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _float(bits, type: tl.constexpr):
    """The low 16 bits as a float of that type, in float32."""
    return bits.to(tl.int16).to(type, bitcast=True).to(tl.float32)


@triton.jit
def gemv_fp8_kernel(
    x,  # [1, K]
    weight,  # [N, K / 4] int32, four e4m3 each
    scales,  # [N], or [ceil(N / 128), K_BLOCKS]: float32
    bias,  # [N]
    residual,  # [1, N]
    y,  # [1, N]
    N,
    WORDS,  # of a row
    K_BLOCKS,
    BLOCKED: tl.constexpr,  # scales of 128 x 128
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    X: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the weight's compute the last one again.
    n = tl.minimum(rows, N - 1)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK_W)
    tiles = weight + n * WORDS + c[None, :]
    fours = x.to(tl.pointer_type(tl.int64)) + c
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Weights are written by no kernel: their first tile may be on its way before the wait.
    w = tl.load(tiles, mask=(c < WORDS)[None, :], other=0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    for k in range(0, WORDS, BLOCK_W):
        if not ONE_STEP:
            after = (k + BLOCK_W + c < WORDS)[None, :]
            if EVEN:
                # Beyond the last step it is used by none: nothing need be zeroed.
                upcoming = tl.load(tiles + k + BLOCK_W, mask=after, eviction_policy="evict_first")
            else:
                upcoming = tl.load(
                    tiles + k + BLOCK_W, mask=after, other=0, eviction_policy="evict_first"
                )
        xx = tl.load(fours + k) if EVEN else tl.load(fours + k, mask=k + c < WORDS, other=0)
        x0 = _float(xx, X)[None, :]
        x1 = _float(xx >> 16, X)[None, :]
        x2 = _float(xx >> 32, X)[None, :]
        x3 = _float(xx >> 48, X)[None, :]
        low, high = _halves(w, ASM)
        if BLOCKED:
            of_rows = scales + tl.program_id(0) * BLOCK_N // 128 * K_BLOCKS
            scale = tl.load(of_rows + (k + c) // 32, mask=k + c < WORDS, other=0.0)[None, :]
            part = _float(low, tl.float16) * x0
            part += _float(low >> 16, tl.float16) * x1
            part += _float(high, tl.float16) * x2
            part += _float(high >> 16, tl.float16) * x3
            acc += scale * part
        else:
            acc += _float(low, tl.float16) * x0
            acc += _float(low >> 16, tl.float16) * x1
            acc += _float(high, tl.float16) * x2
            acc += _float(high >> 16, tl.float16) * x3
        if not ONE_STEP:
            w = upcoming
    out = tl.sum(acc, 1)
    mask = rows < N
    if not BLOCKED:
        out *= tl.load(scales + rows, mask=mask, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=mask)


def plan_gemv_fp8(n: int, k: int) -> GemvFp8Config:
    """The tile of one row times an [n, k] weight.

    ``bench/gpu_products.py --kinds fp8 --sweep`` prints the alternatives.
    """
    if n <= 4096:
        # Too few rows to fill the GPU by themselves: more threads along K.
        return GemvFp8Config(16 if n > 2048 else 8, 256, 16)
    return GemvFp8Config(32 if n <= 8192 else 16, 128, 8)


def gemv_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: GemvFp8Config | None = None,
) -> torch.Tensor:
    """One row: x [1, K] @ (weight [N, K] * scales).T -> y [1, N], filled and returned.

    K must be a multiple of 4.
    """
    n, k = weight.shape
    config = config or plan_gemv_fp8(n, k)
    blocked = scales.ndim == 2
    words = k // 4
    gemv_fp8_kernel[(cdiv(n, config.block_n),)](
        x,
        weight.view(torch.int32),
        scales,
        bias if bias is not None else x,
        residual if residual is not None else x,
        y,
        n,
        words,
        scales.shape[1] if blocked else 0,
        BLOCKED=blocked,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=config.block_n,
        BLOCK_W=config.words,
        EVEN=words % config.words == 0,
        ONE_STEP=words <= config.words,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=1,
        **pdl_options(),
    )
    return y
