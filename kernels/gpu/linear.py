"""linear and the fused forms that save graph nodes at small batches.

Four ways, chosen by the number of rows M (``plan_linear``):

- M = 1: ``gemv_kernel``, plain fused multiply-adds: a program owns a few weight rows and reads them
  with 16-byte loads, which is enough to reach the memory's read rate.
- M <= SKINNY_MAX_ROWS and very many weight rows (an output head): ``skinny_kernel``, matrix units
  with the weights on the M side of the dot, because they take at least 16 (mma) or 64 (wgmma) rows
  on that side but only 16 on the other. Split over K where the weight has too few rows to fill the
  GPU; the last arriver of a tile adds the partial sums in a fixed order, so that results do not
  change from run to run.
- many rows of float32: ``linear_f32``.
- otherwise: cuBLAS.

Both kernels have the same options: a preceding rms_norm (its scale 1/rms(x) is one number a row, so
it is multiplied at the end and costs no pass of its own), a gated activation of interleaved gate
and up rows, and a residual add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .activation import GATED_KINDS, activate, gated_activation
from .launch import (
    cdiv,
    check_shape,
    check_tensors,
    counters,
    next_power_of_2,
    num_sms,
    pdl_options,
)
from .linear_f32 import MIN_ROWS, linear_f32
from .norm import rms_norm

# On an H100 skinny_kernel wins where the weight's rows alone fill the GPU many times over (343
# against 377 us for 8B's head). Elsewhere it is level with cuBLAS when timed alone, and slower
# between the other kernels of a step (16 rows: 8.0 against 6.6 ms for 8B, 1.31 against 0.92 for
# 135M).
SKINNY_MAX_ROWS = 64
MANY_OUTPUTS = 32768
# A fused norm is recomputed by every program, which from two rows on costs more than a pass of its
# own (8.7 against 6.0 us for gate and up of a 135M model).
FUSED_NORM_MAX_ROWS = 1


class GemvConfig(NamedTuple):
    """Tile of gemv_kernel. ``prefetch``: the next tile's loads are issued before this one's math,
    and with PDL the first before the predecessor has ended."""

    block_n: int
    block_k: int
    num_warps: int
    prefetch: bool


class SkinnyConfig(NamedTuple):
    """Tile of skinny_kernel: weight rows, K elements, parts of K."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit
def finish_tile(
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
    finish_tile(
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


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [M, OUT]
    norm_weight,  # [K]
    y,  # [M, OUT]
    partial,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_M] float32
    partial_squares,  # [SPLIT_K, tiles, BLOCK_M] float32
    counters,  # [tiles] int32, zero
    M,
    N,
    K,
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_tiles = tl.num_programs(0)
    i = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = i if GATE == "" else i // 2 + (i % 2) * (N // 2)
    m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    in_rows = (i < N)[:, None]
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
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        in_k = k + cols < K
        w = tl.load(
            w_tiles + k, mask=in_rows & in_k[None, :], other=0.0, eviction_policy="evict_first"
        )
        xk = tl.load(x_tiles + k, mask=in_m & in_k[:, None], other=0.0)
        if HAS_NORM:
            wide = xk.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            g = tl.load(norm_weight + k + cols, mask=in_k, other=0.0).to(tl.float32)
            xk = (wide * (g + weight_offset)[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(w, xk, acc, input_precision="ieee")
    if SPLIT_K == 1:
        finish_tile(
            acc, squares, bias, residual, y, tile, M, N, K, eps,
            HAS_BIAS, HAS_RESIDUAL, HAS_NORM, GATE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
    else:
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        here = part * num_tiles + tile
        tl.store(partial + here * (BLOCK_N * BLOCK_M) + inner, acc)
        if HAS_NORM:
            tl.store(partial_squares + here * BLOCK_M + m, squares)
        # All threads' stores come before the count; the count orders them for the last arriver.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            squares = tl.zeros([BLOCK_M], dtype=tl.float32)
            for p in tl.static_range(SPLIT_K):
                there = p * num_tiles + tile
                acc += tl.load(partial + there * (BLOCK_N * BLOCK_M) + inner, cache_modifier=".cg")
                if HAS_NORM:
                    squares += tl.load(partial_squares + there * BLOCK_M + m, cache_modifier=".cg")
            finish_tile(
                acc, squares, bias, residual, y, tile, M, N, K, eps,
                HAS_BIAS, HAS_RESIDUAL, HAS_NORM, GATE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            tl.store(counters + tile, 0)


def plan_gemv(n: int, k: int) -> GemvConfig:
    """The tile of one row times an [n, k] weight, as measured inside whole steps on an H100."""
    if k < 1024:
        # The whole row in one step. An output head has programs enough to hide its loads.
        if n > MANY_OUTPUTS:
            return GemvConfig(4, next_power_of_2(k), 4, prefetch=False)
        return GemvConfig(8, next_power_of_2(k), 8 if n < 2048 else 4, prefetch=True)
    if k < 2048:
        return GemvConfig(4, 2048, 8, prefetch=True)
    if 4096 <= k < 8192:
        return GemvConfig(2, 4096 if 4096 < n < 16384 else 2048, 8, prefetch=True)
    return GemvConfig(8, 1024, 8, prefetch=True)


def plan_skinny(m: int, n: int, k: int, sms: int) -> SkinnyConfig:
    """The tile of m rows (2 .. SKINNY_MAX_ROWS) times an [n, k] weight.

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


def skinny(
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
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """A few rows: x [M, K], weight [N, K] -> y [M, N] (gated: [M, N / 2]), filled and returned."""
    m = x.shape[0]
    n, k = weight.shape
    config = config or plan_skinny(m, n, k, num_sms(x.device))
    tiles = cdiv(n, config.block_n)
    block_m = max(next_power_of_2(m), 16)
    if config.split_k > 1:
        partial = torch.empty(
            config.split_k * tiles * (config.block_n + 1) * block_m,
            dtype=torch.float32,
            device=x.device,
        )
        partial_squares = partial[config.split_k * tiles * config.block_n * block_m :]
        counts = counters(x.device, tiles)
    else:
        partial = partial_squares = counts = y
    skinny_kernel[(tiles, config.split_k)](
        x,
        weight,
        bias if bias is not None else x,
        residual if residual is not None else x,
        norm_weight if norm_weight is not None else x,
        y,
        partial,
        partial_squares,
        counts,
        m,
        n,
        k,
        eps,
        weight_offset,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm_weight is not None,
        GATE=gate,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y


def plan_linear(rows: int, outputs: int, dtype: torch.dtype) -> str:
    """How ``rows`` activations meet ``outputs`` weights: "gemv", "skinny", "f32" or "cublas"."""
    if rows == 1:
        return "gemv"
    if rows <= SKINNY_MAX_ROWS and outputs >= MANY_OUTPUTS and dtype != torch.float32:
        return "skinny"
    if rows >= MIN_ROWS and dtype == torch.float32:
        return "f32"
    return "cublas"


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
) -> tuple[int, int, int]:
    check_tensors(x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}")
    rows, k = x.shape
    n = weight.shape[0]
    check_shape("weight", weight, n, k)
    if bias is not None:
        check_shape("bias", bias, n)
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, k)
    return rows, n, k


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias: x [T, K], weight [N, K], bias [N] -> [T, N] in out_dtype or x's type.

    Raises:
        ValueError: on a wrong shape, layout, type or device.
    """
    rows, n, _ = _check_linear(x, weight, bias, None, None)
    dtype = out_dtype or x.dtype
    way = plan_linear(rows, n, x.dtype)
    if way in ("gemv", "skinny"):
        y = torch.empty((rows, n), dtype=dtype, device=x.device)
        return (gemv if way == "gemv" else skinny)(x, weight, bias, y)
    if way == "f32" and dtype == x.dtype:
        return linear_f32(x, weight, bias, torch.empty((rows, n), dtype=dtype, device=x.device))
    if dtype == x.dtype:
        return F.linear(x, weight, bias)
    if x.device.type == "cuda":
        # cuBLAS writes the wider type itself: no rounding, no extra kernel.
        y = torch.mm(x, weight.t(), out_dtype=dtype)
    else:
        y = torch.mm(x.to(dtype), weight.to(dtype).t())
    return y if bias is None else y.add_(bias)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x @ weight.T + bias, in place: residual [T, N]; returns it."""
    rows, n, _ = _check_linear(x, weight, bias, residual, None)
    check_shape("residual", residual, rows, n)
    way = plan_linear(rows, n, x.dtype)
    if way in ("gemv", "skinny"):
        return (gemv if way == "gemv" else skinny)(x, weight, bias, residual, residual=residual)
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """linear(rms_norm(x, norm_weight, eps), weight, bias); one kernel for a few rows."""
    return _norm_linear(x, norm_weight, eps, weight, bias, weight_offset, "")


def norm_gated_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    kind: str,
    *,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """gated_activation(linear(rms_norm(x), weight), kind): weight [2F, K] -> [T, F]."""
    if kind not in GATED_KINDS:
        raise ValueError(f"unknown gated activation {kind!r}, known: {', '.join(GATED_KINDS)}")
    return _norm_linear(x, norm_weight, eps, weight, None, weight_offset, kind)


def _norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_offset: float,
    gate: str,
) -> torch.Tensor:
    rows, n, _ = _check_linear(x, weight, bias, None, norm_weight)
    way = plan_linear(rows, n, x.dtype)
    # skinny_kernel rounds x times the norm's weight before the scale is known: float16 could
    # overflow there.
    if way == "gemv" or (
        way == "skinny" and rows <= FUSED_NORM_MAX_ROWS and x.dtype == torch.bfloat16
    ):
        y = torch.empty((rows, n // 2 if gate else n), dtype=x.dtype, device=x.device)
        return (gemv if way == "gemv" else skinny)(
            x,
            weight,
            bias,
            y,
            norm_weight=norm_weight,
            eps=eps,
            weight_offset=weight_offset,
            gate=gate,
        )
    normed = rms_norm(x, norm_weight, eps, weight_offset=weight_offset)
    assert isinstance(normed, torch.Tensor)
    if not gate:
        return linear(normed, weight, bias)
    if way == "skinny":
        y = torch.empty((rows, n // 2), dtype=x.dtype, device=x.device)
        return skinny(normed, weight, bias, y, gate=gate)
    return gated_activation(linear(normed, weight, bias), gate)
