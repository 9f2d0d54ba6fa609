"""dequantize_fp8: a weight of 8-bit floats in wider ones, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, pdl_options

BLOCK_N, BLOCK_K = 16, 256


@triton.jit
def dequantize_fp8_kernel(
    weight,  # [N, K]
    scales,  # [N], or [ceil(N / 128), K_BLOCKS]: float32
    y,  # [N, K]
    N,
    K,
    K_BLOCKS,
    BLOCKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (n < N) & (k < K)
    w = tl.load(weight + n * K + k, mask=mask, other=0.0).to(tl.float16).to(tl.float32)
    if BLOCKED:
        w *= tl.load(scales + n // 128 * K_BLOCKS + k // 128, mask=mask, other=0.0)
    else:
        w *= tl.load(scales + n, mask=n < N, other=0.0)
    if PDL:
        # The memory written may still be read by what runs before.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(y + n * K + k, w.to(y.dtype.element_ty), mask=mask)


def dequantize_fp8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight e4m3 [N, K] times its scales, in dtype; scales as ``linear_fp8.Fp8Weight``'s."""
    n, k = weight.shape
    y = torch.empty((n, k), dtype=dtype, device=weight.device)
    blocked = scales.ndim == 2
    if n and k:
        dequantize_fp8_kernel[(cdiv(n, BLOCK_N), cdiv(k, BLOCK_K))](
            weight,
            scales,
            y,
            n,
            k,
            scales.shape[1] if blocked else 0,
            BLOCKED=blocked,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    return y
