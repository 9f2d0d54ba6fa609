"""gemv: one row times a weight, by plain fused multiply-adds.

A program owns a few weight rows and reads them with 16-byte loads, which is enough to reach the
memory's read rate. A preceding rms_norm costs no pass of its own: its scale 1/rms(x) is one number,
multiplied at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activation import activate
from .launch import cdiv, next_power_of_2, pdl_options

# An output head of more rows than this has programs enough to hide its loads.
MANY_OUTPUTS = 32768


class GemvConfig(NamedTuple):
    """Tile of gemv_kernel. ``prefetch``: the next tile's loads are issued before this one's math,
    and with PDL the first before the predecessor has ended."""

    block_n: int
    block_k: int
    num_warps: int
    prefetch: bool


@triton.jit
def gemv_kernel(
    x,  # [1, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [1, OUT]
    norm_weight,  # [K]
    y,  # [1, OUT]
    N,
    K,
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation of the gate half
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    ONE_STEP: tl.constexpr,  # K <= BLOCK_K
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = i if GATE == "" else i // 2 + (i % 2) * (N // 2)
    cols = tl.arange(0, BLOCK_K)
    in_rows = (i < N)[:, None]
    tiles = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH:
        # Weights are written by no kernel: their first tile may be on its way before the wait.
        w = tl.load(
            tiles, mask=in_rows & (cols < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = k + cols < K
        if PREFETCH and not ONE_STEP:
            upcoming = tl.load(
                tiles + k + BLOCK_K,
                mask=in_rows & (k + BLOCK_K + cols < K)[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        elif not PREFETCH:
            w = tl.load(
                tiles + k, mask=in_rows & in_k[None, :], other=0.0, eviction_policy="evict_first"
            )
        xk = tl.load(x + k + cols, mask=in_k, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += xk * xk
            g = tl.load(norm_weight + k + cols, mask=in_k, other=0.0).to(tl.float32)
            xk = xk * (g + weight_offset)
        acc += w.to(tl.float32) * xk[None, :]
        if PREFETCH and not ONE_STEP:
            w = upcoming
    sum_squares = tl.zeros([1], dtype=tl.float32)
    if HAS_NORM:
        sum_squares += tl.sum(squares, 0)
    _finish(
        tl.sum(acc, 1)[:, None],
        sum_squares,
        bias,
        residual,
        y,
        tile,
        1,
        N,
        K,
        eps,
        HAS_BIAS,
        HAS_RESIDUAL,
        HAS_NORM,
        GATE,
        BLOCK_N,
        1,
    )


@triton.jit
def _finish(
    acc,  # [BLOCK_N, BLOCK_M] float32: weight rows x activations' rows
    sum_squares,  # [BLOCK_M] float32: of x's rows, for the norm
    bias,
    residual,
    y,  # [M, OUT], OUT = N or, gated, N / 2
    tile,
    M,
    N,
    K,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Norm scale, bias, gate, residual, store."""
    m = tl.arange(0, BLOCK_M)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_NORM:
        acc = acc * tl.rsqrt(sum_squares / K + eps)[None, :]
    rows = i if GATE == "" else i // 2 + (i % 2) * (N // 2)
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=i < N, other=0.0).to(tl.float32)[:, None]
    if GATE == "":
        n = i
        width = N
    else:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(pairs)
        acc = activate(gate, GATE) * up
        n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = N // 2
    mask = (n[:, None] < width) & (m[None, :] < M)
    offsets = m[None, :] * width + n[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)


def plan_gemv(n: int, k: int) -> GemvConfig:
    """The tile of one row times an [n, k] weight, by sweeps inside whole steps.

    ``bench/kernels_gpu.py --only linear --sweep`` prints the alternatives.
    """
    if k < 1024:
        # The whole row in one step.
        if n > MANY_OUTPUTS:
            return GemvConfig(4, next_power_of_2(k), 4, prefetch=False)
        return GemvConfig(8, next_power_of_2(k), 8 if n < 2048 else 4, prefetch=True)
    if k < 2048:
        return GemvConfig(4, 2048, 8, prefetch=True)
    if 4096 <= k < 8192:
        return GemvConfig(2, 4096 if 4096 < n < 16384 else 2048, 8, prefetch=True)
    return GemvConfig(8, 1024, 8, prefetch=True)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    gate: str = "",
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """One row: x [1, K], weight [N, K] -> y [1, N] (gated: [1, N / 2]), filled and returned."""
    n, k = weight.shape
    config = config or plan_gemv(n, k)
    gemv_kernel[(cdiv(n, config.block_n),)](
        x,
        weight,
        bias if bias is not None else x,
        residual if residual is not None else x,
        norm_weight if norm_weight is not None else x,
        y,
        n,
        k,
        eps,
        weight_offset,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm_weight is not None,
        GATE=gate,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PREFETCH=config.prefetch,
        ONE_STEP=k <= config.block_k,
        num_warps=config.num_warps,
        num_stages=1,
        **pdl_options(),
    )
    return y
