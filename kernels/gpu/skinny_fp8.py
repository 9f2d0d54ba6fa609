"""skinny_fp8: a few rows times a weight of 8-bit floats, on the matrix units.

As ``skinny``. Activations of 16 bits meet weights widened on the way; activations of 8 bits (one
scale a row) meet them as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import block_rows, cdiv, counters, num_sms, pdl_options
from .skinny import finish_tile


class SkinnyFp8Config(NamedTuple):
    """Tile of skinny_fp8_kernel: weight rows, elements along K, parts of K."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit
def widen(w, x):
    """w in the type of what x points to; by way of float32, since the direct conversion is slow."""
    if x.dtype.element_ty == tl.bfloat16:
        return w.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    return w.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def skinny_fp8_kernel(
    x,  # [M, K], or 8-bit floats
    x_scale,  # [M] float32, of those
    weight,  # [N, K] 8-bit floats
    scales,  # [N] float32, or [ceil(N / 128), K_BLOCKS]
    bias,  # [N]
    residual,  # [M, N]
    y,  # [M, N]
    partial,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_M] float32
    counters,  # [tiles] int32, zero
    M,
    N,
    K,
    K_BLOCKS,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCALED_X: tl.constexpr,
    BLOCKED: tl.constexpr,  # scales of 128 x 128
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(rows, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    in_m = (m < M)[None, :]
    cols = tl.arange(0, BLOCK_K)
    w_tiles = weight + n[:, None] * K + cols[None, :]
    x_tiles = x + m[None, :] * K + cols[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if not BLOCKED:
        scale = tl.load(scales + n)
    if PDL:
        tl.extra.cuda.gdc_wait()
    k_part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = tl.program_id(1) * k_part
    end = tl.minimum(begin + k_part, K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN:
            w = tl.load(w_tiles + k, eviction_policy="evict_first")
            xk = tl.load(x_tiles + k, mask=in_m, other=0.0)
        else:
            in_k = k + cols < K
            w = tl.load(w_tiles + k, mask=in_k[None, :], other=0.0, eviction_policy="evict_first")
            xk = tl.load(x_tiles + k, mask=in_m & in_k[:, None], other=0.0)
        if BLOCKED:
            s = tl.load(scales + n // 128 * K_BLOCKS + k // 128)
            acc += s[:, None] * tl.dot(widen(w, x), xk)
        else:
            acc = tl.dot(widen(w, x), xk, acc)
    if not BLOCKED:
        acc *= scale[:, None]
    if SCALED_X:
        acc *= tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
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


def plan_skinny_fp8(m: int, n: int, k: int, sms: int) -> SkinnyFp8Config:
    """The tile of m rows times an [n, k] weight."""
    split = 1
    while split < 8 and cdiv(n, 64) * split < 2 * sms and k >= 1024 * split:
        split *= 2
    return SkinnyFp8Config(64, 128, split, 4, 3)


def skinny_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: SkinnyFp8Config | None = None,
) -> torch.Tensor:
    """residual + x [M, K] @ weight.T + bias -> y [M, N], filled and returned."""
    m, k = x.shape
    n = weight.shape[0]
    config = config or plan_skinny_fp8(m, n, k, num_sms(x.device))
    tiles = cdiv(n, config.block_n)
    block_m = block_rows(m)
    if config.split_k > 1:
        partial = torch.empty(
            config.split_k * tiles * config.block_n * block_m, dtype=torch.float32, device=x.device
        )
        counts = counters(x.device, tiles)
    else:
        partial = counts = y
    blocked = scales.ndim == 2
    skinny_fp8_kernel[(tiles, config.split_k)](
        x,
        scales if x_scale is None else x_scale,
        weight,
        scales,
        bias if bias is not None else y,
        residual if residual is not None else y,
        y,
        partial,
        counts,
        m,
        n,
        k,
        scales.shape[1] if blocked else 1,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SCALED_X=x_scale is not None,
        BLOCKED=blocked,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        EVEN=k % config.block_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y
