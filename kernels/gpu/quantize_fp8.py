"""quantize_rows, quantize_normed: activations in 8-bit floats, one scale a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..weights import Norm
from .activation import activate
from .launch import check_shape, check_tensors, next_power_of_2, pdl_options

FP8 = torch.float8_e4m3fn
# The largest number of e4m3.
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def store_fp8(value, y, scales, row, offsets, mask):
    """Store a row of float32, zeros where masked, as 8-bit floats times a scale."""
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / FP8_MAX
    # Rounding may reach beyond the maximum, and what is beyond it is no number.
    rounded = tl.minimum(tl.maximum(value / scale, -FP8_MAX), FP8_MAX)
    tl.store(y + offsets, rounded.to(y.dtype.element_ty), mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def quantize_kernel(
    x,  # [T, F], gated [T, 2 F]
    y,  # [T, F]
    scales,  # [T] float32
    F,
    GATE: tl.constexpr,  # "" or the activation of the gate half
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_F)
    mask = cols < F
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if GATE == "":
        value = tl.load(x + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        gate = tl.load(x + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, activate(gate, GATE) * up, 0.0)
    store_fp8(value, y, scales, row, row * F + cols, mask)


def quantize_rows(x: torch.Tensor, gate: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, F], or gated [T, 2 F], in 8-bit floats [T, F], and each row's scale: float32 [T]."""
    check_tensors(x=x)
    rows, width = x.shape
    width = width // 2 if gate else width
    y = torch.empty((rows, width), dtype=FP8, device=x.device)
    scales = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(width)
        quantize_kernel[(rows,)](
            x,
            y,
            scales,
            width,
            GATE=gate,
            BLOCK_F=block,
            num_warps=min(max(block // 512, 1), 16),
            num_stages=1,
            **pdl_options(),
        )
    return y, scales


@triton.jit
def norm_quantize_kernel(
    x,  # [T, D]
    residual,  # [T, D], updated in place
    weight,  # [D]
    y,  # [T, D]
    scales,  # [T] float32
    D,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h = tl.load(x + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(residual.dtype.element_ty)
        tl.store(residual + row * D + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    value = h * tl.rsqrt(tl.sum(h * h, 0) / D + eps) * w
    store_fp8(tl.where(mask, value, 0.0), y, scales, row, row * D + cols, mask)


def quantize_normed(
    x: torch.Tensor, norm: Norm, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x [T, D], or of its sum with a residual, which becomes it, as quantize_rows."""
    check_tensors(x=x, residual=residual, weight=norm.weight)
    rows, width = x.shape
    check_shape("weight", norm.weight, width)
    if residual is not None:
        check_shape("residual", residual, rows, width)
    y = torch.empty((rows, width), dtype=FP8, device=x.device)
    scales = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(width)
        norm_quantize_kernel[(rows,)](
            x,
            residual if residual is not None else x,
            norm.weight,
            y,
            scales,
            width,
            norm.eps,
            norm.weight_offset,
            HAS_RESIDUAL=residual is not None,
            BLOCK_D=block,
            num_warps=min(max(block // 256, 1), 16),
            num_stages=1,
            **pdl_options(),
        )
    return y, scales
