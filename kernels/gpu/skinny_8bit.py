"""skinny_8bit: a few rows times a weight of 8-bit floats or integers, on the matrix units.

As ``skinny``. Activations of 16 bits meet weights widened on the way; activations of 8 bits (one
scale a row) meet them as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, num_sms, pdl_options
from .limits import block_rows, shared_bytes
from .skinny import finish_tile, split_scratch


class Skinny8BitConfig(NamedTuple):
    """Tile of skinny_8bit_kernel: weight rows, elements along K, parts of K."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit
def widen(w, x):
    """w in the type of what x points to, by conversions that are fast."""
    if w.dtype == tl.int8:
        # The bits of 1024 + 128 + w as a float16.
        bits = ((w.to(tl.int16) & 0xFF) ^ 0x80) | 0x6400
        w = bits.to(tl.float16, bitcast=True) - tl.full([1, 1], 1152.0, tl.float16)
    if x.dtype.element_ty == tl.bfloat16:
        return w.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    return w.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def skinny_8bit_kernel(
    x,  # [M, K], or 8-bit floats
    x_scale,  # [M] float32, of those
    weight,  # [N, K] 8-bit floats or integers
    scales,  # [N], or [ceil(N / SCALE_ROWS), K_BLOCKS]
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
    SCALE_ROWS: tl.constexpr,  # of a block of one scale; 0: one a row
    SCALE_COLS: tl.constexpr,  # a multiple of BLOCK_K
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
    k_part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = tl.program_id(1) * k_part
    end = tl.minimum(begin + k_part, K)
    if SCALE_ROWS == 0:
        scale = tl.load(scales + n).to(tl.float32)
    else:
        # Scales are loaded a step ahead: nothing else hides their latency.
        of_rows = scales + n // SCALE_ROWS * K_BLOCKS
        scale = tl.load(of_rows + tl.minimum(begin // SCALE_COLS, K_BLOCKS - 1)).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN:
            w = tl.load(w_tiles + k, eviction_policy="evict_first")
            xk = tl.load(x_tiles + k, mask=in_m, other=0.0)
        else:
            in_k = k + cols < K
            w = tl.load(w_tiles + k, mask=in_k[None, :], other=0.0, eviction_policy="evict_first")
            xk = tl.load(x_tiles + k, mask=in_m & in_k[:, None], other=0.0)
        if SCALE_ROWS == 0:
            acc = tl.dot(widen(w, x), xk, acc)
        else:
            later = tl.minimum((k + BLOCK_K) // SCALE_COLS, K_BLOCKS - 1)
            upcoming = tl.load(of_rows + later).to(tl.float32)
            acc += scale[:, None] * tl.dot(widen(w, x), xk)
            scale = upcoming
    if SCALE_ROWS == 0:
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


def plan_skinny_8bit(
    m: int, n: int, k: int, x_bytes: int, device: torch.device
) -> Skinny8BitConfig:
    """The tile of m rows, of so many bytes an element, times an [n, k] weight.

    ``bench/gpu_products.py --kinds fp8 --sweep`` prints the alternatives.
    """
    tiles, sms = cdiv(n, 64), num_sms(device)
    fills = tiles >= 2 * sms
    split = 1
    # Activations of 8 bits take so little time that nearly one program a multiprocessor is enough.
    while not fills and split < 4 and k >= 2048 * split and (x_bytes > 1 or 3 * tiles < 2 * sms):
        split *= 2
    if x_bytes == 1:
        config = Skinny8BitConfig(64, 128 if fills else 256, split, 4, 5 if fills else 4)
    elif m <= 16:
        config = Skinny8BitConfig(64, 256, split, 4, 4)
    else:
        config = Skinny8BitConfig(64, 128, split, 4, 3 if fills else 4)
    row_bytes = config.block_k * (config.block_n + block_rows(m) * x_bytes)
    while config.num_stages > 2 and config.num_stages * row_bytes > shared_bytes(device):
        config = config._replace(num_stages=config.num_stages - 1)
    return config


def skinny_8bit(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    scale_block: tuple[int, int] = (0, 0),
    residual: torch.Tensor | None = None,
    config: Skinny8BitConfig | None = None,
) -> torch.Tensor:
    """residual + x [M, K] @ (weight * scales).T + bias -> y [M, N], filled and returned.

    scales: [N], or [rows, columns] of blocks of ``scale_block`` (rows, columns).
    """
    m, k = x.shape
    n = weight.shape[0]
    config = config or plan_skinny_8bit(m, n, k, x.element_size(), x.device)
    tiles = cdiv(n, config.block_n)
    block_m = block_rows(m)
    partial, counts = split_scratch(config.split_k, tiles, config.block_n * block_m, y)
    scale_rows, scale_cols = scale_block
    block_k = min(config.block_k, scale_cols) if scale_rows else config.block_k
    skinny_8bit_kernel[(tiles, config.split_k)](
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
        scales.shape[1] if scale_rows else 1,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        SCALED_X=x_scale is not None,
        SCALE_ROWS=scale_rows,
        SCALE_COLS=scale_cols,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        SPLIT_K=config.split_k,
        EVEN=k % block_k == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return y
