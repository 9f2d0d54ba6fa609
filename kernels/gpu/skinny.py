"""skinny: 2 to 64 rows times a weight of very many rows, on the matrix units.

The weight is on the M side of the dot, because the units take at least 16 (mma) or 64 (wgmma) rows
on that side but only 16 on the other. Split over K where the weight has too few rows to fill the
GPU; the last arriver of a tile adds the partial sums in a fixed order, so that results do not
change from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, counters, next_power_of_2, num_sms, pdl_options

MAX_ROWS = 64


class SkinnyConfig(NamedTuple):
    """Tile of skinny_kernel: weight rows, K elements, parts of K."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [M, N]
    y,  # [M, N]
    partial,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_M] float32
    counters,  # [tiles] int32, zero
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    in_rows = (rows < N)[:, None]
    in_m = (m < M)[None, :]
    w_tiles = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    x_tiles = x + m[None, :] * K + cols[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    k_part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    k_begin = part * k_part
    k_end = tl.minimum(k_begin + k_part, K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        in_k = k + cols < K
        w = tl.load(
            w_tiles + k, mask=in_rows & in_k[None, :], other=0.0, eviction_policy="evict_first"
        )
        xk = tl.load(x_tiles + k, mask=in_m & in_k[:, None], other=0.0)
        acc = tl.dot(w, xk, acc, input_precision="ieee")
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


@triton.jit
def finish_tile(
    acc,  # [BLOCK_N, BLOCK_M] float32: of tile program_id(0), part program_id(1) of K
    bias,
    residual,
    y,
    partial,
    counters,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Adds up the parts of K in the last program of a tile, then bias and residual; stores."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_tiles = tl.num_programs(0)
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    if SPLIT_K == 1:
        _finish(acc, bias, residual, y, n, m, M, N, HAS_BIAS, HAS_RESIDUAL)
    else:
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m
        tl.store(partial + (part * num_tiles + tile) * (BLOCK_N * BLOCK_M) + inner, acc)
        # All threads' stores come before the count; the count orders them for the last arriver.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            for p in tl.static_range(SPLIT_K):
                there = p * num_tiles + tile
                acc += tl.load(partial + there * (BLOCK_N * BLOCK_M) + inner, cache_modifier=".cg")
            _finish(acc, bias, residual, y, n, m, M, N, HAS_BIAS, HAS_RESIDUAL)
            tl.store(counters + tile, 0)


@triton.jit
def _finish(
    acc,  # [BLOCK_N, BLOCK_M] float32
    bias,
    residual,
    y,
    n,  # [BLOCK_N, 1]
    m,  # [1, BLOCK_M]
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    mask = (n < N) & (m < M)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + m * N + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, acc.to(y.dtype.element_ty), mask=mask)


def split_scratch(
    split_k: int, tiles: int, tile_len: int, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``partial`` and ``counters`` of ``finish_tile``; y stands in where K is not split."""
    if split_k == 1:
        return y, y
    partial = torch.empty(split_k * tiles * tile_len, dtype=torch.float32, device=y.device)
    return partial, counters(y.device, tiles)


def plan_skinny(m: int, n: int, k: int, sms: int) -> SkinnyConfig:
    """The tile of m rows (2 .. MAX_ROWS) times an [n, k] weight.

    Two programs a multiprocessor hide each other's latency; K is split when the weight's rows
    alone do not give as many, into parts of at least four steps.
    """
    block_k = 128 if m <= 32 else 64
    for block_n in (64, 32, 16):
        if cdiv(n, block_n) >= 2 * sms:
            return SkinnyConfig(block_n, block_k, 1, 4, 4)
    block_n = 32 if m > 16 else 16
    split = min(cdiv(2 * sms, cdiv(n, block_n)), max(k // (4 * block_k), 1), 16)
    return SkinnyConfig(block_n, block_k, next_power_of_2(split), 4, 4)


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """residual + x [M, K] @ weight [N, K].T + bias -> y [M, N], filled and returned."""
    m = x.shape[0]
    n, k = weight.shape
    config = config or plan_skinny(m, n, k, num_sms(x.device))
    tiles = cdiv(n, config.block_n)
    block_m = max(next_power_of_2(m), 16)
    partial, counts = split_scratch(config.split_k, tiles, config.block_n * block_m, y)
    skinny_kernel[(tiles, config.split_k)](
        x,
        weight,
        bias if bias is not None else x,
        residual if residual is not None else x,
        y,
        partial,
        counts,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y
