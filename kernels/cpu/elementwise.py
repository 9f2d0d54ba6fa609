"""Norms and activations. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from .tensors import float_code, matrix, refuse, vector


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.rms_norm. The new residual is written into ``residual``.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    return _norm(x, weight, None, eps, residual, False, weight_offset)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.layer_norm. The new residual is written into ``residual``.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    return _norm(x, weight, bias, eps, residual, True, 0.0)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_layer_norm: bool,
    weight_offset: float,
) -> Tensor | tuple[Tensor, Tensor]:
    code, rows, cols = matrix(x, "x")
    weight_ptr, weight_code = vector(weight, "weight", cols)
    bias_ptr, bias_code = (0, 0) if bias is None else vector(bias, "bias", cols)
    residual_ptr = 0
    if residual is not None:
        if (
            residual.dtype != x.dtype
            or residual.shape != x.shape
            or not residual.is_cpu
            or not residual.is_contiguous()
        ):
            raise refuse(residual, "residual", "like x")
        residual_ptr = residual.data_ptr()
        if residual_ptr == x.data_ptr() and x.numel():
            raise ValueError("residual must not be x itself")
    out = torch.empty_like(x)
    _core.cpu_norm(
        x.data_ptr(),
        code,
        rows,
        cols,
        residual_ptr,
        weight_ptr,
        weight_code,
        bias_ptr,
        bias_code,
        is_layer_norm,
        eps,
        weight_offset,
        out.data_ptr(),
    )
    return out if residual is None else (out, residual)


def activation(x: Tensor, kind: str) -> Tensor:
    """See reference.activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    code = float_code(x, "x")
    out = torch.empty_like(x)
    _core.cpu_activation(kind, False, x.data_ptr(), code, 1, x.numel(), out.data_ptr())
    return out


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """See reference.gated_activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    code, rows, cols = matrix(x, "x")
    if cols % 2:
        raise refuse(x, "x", "of an even number of columns")
    if kind not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"unknown gated activation {kind!r}")
    out = torch.empty((rows, cols // 2), dtype=x.dtype)
    _core.cpu_activation(kind, True, x.data_ptr(), code, rows, cols // 2, out.data_ptr())
    return out
