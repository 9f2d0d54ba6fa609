"""rms_norm and layer_norm, each with an optional residual add: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import check_shape, check_tensors, next_power_of_2, pdl_options

MAX_HIDDEN_SIZE = 32768  # one row must fit a program's registers


@triton.jit
def norm_kernel(
    x,  # [T, D]
    residual,  # [T, D], updated in place
    weight,  # [D]
    bias,  # [D]
    y,  # [T, D]
    D,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTER: tl.constexpr,  # layer norm: subtract the mean
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    # Weights first: they are there before the predecessor ends.
    if HAS_WEIGHT:
        w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if HAS_BIAS:
        b = tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h = tl.load(x + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        # The residual stream is kept in the model's type; the norm sees what the next layer sees.
        rounded = h.to(residual.dtype.element_ty)
        tl.store(residual + row * D + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if CENTER:
        h = tl.where(mask, h - tl.sum(h, 0) / D, 0.0)
    out = h * tl.rsqrt(tl.sum(h * h, 0) / D + eps)
    if HAS_WEIGHT:
        out = out * w
    if HAS_BIAS:
        out = out + b
    tl.store(y + row * D + cols, out.to(y.dtype.element_ty), mask=mask)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    center: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    check_tensors(x=x, weight=weight, bias=bias, residual=residual)
    rows, hidden = x.shape
    if hidden > MAX_HIDDEN_SIZE:
        raise ValueError(f"rows of {hidden} values: at most {MAX_HIDDEN_SIZE} are supported")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_shape(name, vector, hidden)
    if residual is not None:
        check_shape("residual", residual, rows, hidden)
    y = torch.empty_like(x)
    if rows:
        block = next_power_of_2(hidden)
        norm_kernel[(rows,)](
            x,
            residual if residual is not None else x,
            weight if weight is not None else x,
            bias if bias is not None else x,
            y,
            hidden,
            eps,
            weight_offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CENTER=center,
            BLOCK_D=block,
            # 8 values a thread: one 16-byte load each.
            num_warps=min(max(block // 256, 1), 16),
            num_stages=1,
            **pdl_options(),
        )
    return y if residual is None else (y, residual)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * (weight + weight_offset), rowwise.

    Args:
        x: [T, D].
        weight: [D].
        eps: added to the mean square.
        residual: [T, D]; then x + residual is normed, and residual becomes that sum in place.
        weight_offset: 1.0 for Gemma.

    Returns:
        y [T, D]; with a residual (y, residual).

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    return _norm(x, weight, None, eps, residual, weight_offset, center=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) / std * weight + bias, rowwise; arguments and result as rms_norm's."""
    return _norm(x, weight, bias, eps, residual, 0.0, center=True)
