"""gemv_streamed: one row times a weight of 16-bit floats, weights loaded far ahead.

As many programs as the GPU holds have a stretch of the weight's rows each. A program's loop loads
tiles of whole rows by the pipeliner, and waits for the predecessor in the first iteration, behind
the loads of all stages: while others compute, a shared memory full of weights arrives. Sums stay in
registers until the loop ends, since what is loaded inside it would be loaded ahead as well.

The norm before it, the gate and the residual after it cost no passes of their own: programs are so
few that each may compute the norm again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..weights import Norm
from .activation import activate
from .gemv_w4 import row_of
from .launch import next_power_of_2, pdl_options
from .streamed import StreamConfig, stretch_of


@triton.jit
def _finish(
    sums,  # [ROWS] float32, of rows first .. last of the weight as row_of counts them
    first,
    last,
    residual,  # [1, OUT], OUT = N or, gated, N / 2
    y,  # [1, OUT]
    HAS_RESIDUAL: tl.constexpr,  # that is still to be added
    GATE: tl.constexpr,  # "" or the activation of the gate half
):
    """Gate, residual, store."""
    ROWS: tl.constexpr = sums.shape[0]
    if GATE == "":
        at = first + tl.arange(0, ROWS)
        end = last
    else:
        gate, up = tl.split(tl.reshape(sums, (ROWS // 2, 2)))
        sums = activate(gate, GATE) * up
        at = first // 2 + tl.arange(0, ROWS // 2)
        end = last // 2
    if HAS_RESIDUAL:
        sums += tl.load(residual + at, mask=at < end, other=0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=at < end)


@triton.jit
def gemv_streamed_kernel(
    x,  # [1, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [1, OUT]
    norm_weight,  # [K]
    y,  # [1, OUT]
    N,
    K,
    ROWS,  # of a program
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation of the gate half
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # K or more
    STEPS: tl.constexpr,  # of a program, or more
    EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_K)
    in_k = cols < K
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_BIAS:
        b = tl.load(bias + row_of(first + tl.arange(0, STEPS * BLOCK_N), N, GATE))
    if HAS_NORM:
        g = tl.load(norm_weight + cols, mask=in_k, other=0.0)
    xk = tl.zeros([BLOCK_K], dtype=tl.float32)
    squares = 0.0
    added = tl.zeros([STEPS * BLOCK_N], dtype=tl.float32)
    steps = tl.arange(0, STEPS)[None, :]
    sums = tl.zeros([BLOCK_N, STEPS], dtype=tl.float32)
    for i in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        rows = row_of(i + tl.arange(0, BLOCK_N), N, GATE)
        tiles = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
        if EVEN:
            w = tl.load(tiles, eviction_policy="evict_first")
        else:
            w = tl.load(tiles, mask=in_k[None, :], other=0.0, eviction_policy="evict_first")
        if i == first:
            # Here, and not before the loop, so that the loads of all stages come first.
            if PDL:
                tl.extra.cuda.gdc_wait()
            xk = tl.load(x + cols, mask=in_k, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares = tl.sum(xk * xk, 0)
                xk = xk * (g.to(tl.float32) + weight_offset)
            if HAS_RESIDUAL and GATE == "":
                at = first + tl.arange(0, STEPS * BLOCK_N)
                added = tl.load(residual + at, mask=at < last, other=0.0).to(tl.float32)
        of_rows = tl.sum(w.to(tl.float32) * xk[None, :], 1)
        sums = tl.where(steps == (i - first) // BLOCK_N, of_rows[:, None], sums)
    if HAS_NORM:
        sums *= tl.rsqrt(squares / K + eps)
    in_order = tl.reshape(tl.trans(sums), (STEPS * BLOCK_N,)) + added
    if HAS_BIAS:
        in_order += b.to(tl.float32)
    _finish(in_order, first, last, residual, y, HAS_RESIDUAL and GATE != "", GATE)


def gemv_streamed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    config: StreamConfig,
    residual: torch.Tensor | None = None,
    norm: Norm | None = None,
    gate: str = "",
) -> torch.Tensor:
    """One row: x [1, K], weight [N, K] -> y [1, N] (gated: [1, N / 2]), filled and returned."""
    n, k = weight.shape
    block_k = next_power_of_2(k)
    stretch = stretch_of(n, config, bool(gate), x.device)
    gemv_streamed_kernel[(stretch.programs,)](
        x,
        weight,
        bias if bias is not None else x,
        residual if residual is not None else x,
        norm.weight if norm is not None else x,
        y,
        n,
        k,
        stretch.rows,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None,
        GATE=gate,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        STEPS=stretch.steps,
        EVEN=block_k == k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return y
