"""dequantize_8bit: a weight of 8 bits an element in wider floats, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options

BLOCK_N, BLOCK_K = 16, 256


@triton.jit
def dequantize_8bit_kernel(
    weight,  # [N, K]
    scales,  # [N], or [ceil(N / SCALE_ROWS), K_BLOCKS]
    y,  # [N, K]
    N,
    K,
    K_BLOCKS,
    SCALE_ROWS: tl.constexpr,  # of a block of one scale; 0: one a row
    SCALE_COLS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (n < N) & (k < K)
    w = tl.load(weight + n * K + k, mask=mask, other=0.0).to(tl.float16).to(tl.float32)
    if SCALE_ROWS == 0:
        w *= tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
    else:
        at = n // SCALE_ROWS * K_BLOCKS + k // SCALE_COLS
        w *= tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        # The memory written may still be read by what runs before.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y + n * K + k, w.to(y.dtype.element_ty), mask=mask)


def dequantize_8bit(
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    scale_block: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """weight e4m3 or int8 [N, K] times its scales, in dtype; as ``skinny_8bit`` takes them."""
    n, k = weight.shape
    y = torch.empty((n, k), dtype=dtype, device=weight.device)
    if n and k:
        dequantize_8bit_kernel[(cdiv(n, BLOCK_N), cdiv(k, BLOCK_K))](
            weight,
            scales,
            y,
            n,
            k,
            scales.shape[1] if scale_block[0] else 0,
            SCALE_ROWS=scale_block[0],
            SCALE_COLS=scale_block[1],
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    return y
