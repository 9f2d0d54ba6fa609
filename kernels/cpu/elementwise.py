"""Norms and activations. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from .tensors import Matrix, float_type, matrix, optional_vector, refuse, vector


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
    x_matrix, residual_matrix = _inputs(x, residual)
    _, element, rows, cols = x_matrix
    out = torch.empty_like(x)
    _core.cpu_rms_norm(
        x_matrix,
        residual_matrix,
        vector(weight, "weight", cols),
        eps=eps,
        weight_offset=weight_offset,
        out=(out.data_ptr(), element, rows, cols),
    )
    return out if residual is None else (out, residual)


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
    x_matrix, residual_matrix = _inputs(x, residual)
    _, element, rows, cols = x_matrix
    out = torch.empty_like(x)
    _core.cpu_layer_norm(
        x_matrix,
        residual_matrix,
        vector(weight, "weight", cols),
        optional_vector(bias, "bias", cols),
        eps,
        (out.data_ptr(), element, rows, cols),
    )
    return out if residual is None else (out, residual)


def _inputs(x: Tensor, residual: Tensor | None) -> tuple[Matrix, Matrix | None]:
    """A norm's input, and the residual that is added to it and overwritten."""
    x_matrix = address, element, rows, cols = matrix(x, "x")
    if residual is None:
        return x_matrix, None
    if (
        residual.dtype != x.dtype
        or residual.shape != x.shape
        or not residual.is_cpu
        or not residual.is_contiguous()
    ):
        raise refuse(residual, "residual", "like x")
    residual_address = residual.data_ptr()
    if residual_address == address and x.numel():
        raise ValueError("residual must not be x itself")
    return x_matrix, (residual_address, element, rows, cols)


def activation(x: Tensor, kind: str) -> Tensor:
    """See reference.activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    element, size = float_type(x, "x"), x.numel()
    out = torch.empty_like(x)
    row = (x.data_ptr(), element, 1, size)
    _core.cpu_activation(kind, False, row, (out.data_ptr(), element, 1, size))
    return out


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """See reference.gated_activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    x_matrix = _, element, rows, cols = matrix(x, "x")
    if cols % 2:
        raise refuse(x, "x", "of an even number of columns")
    if kind not in ("silu", "gelu", "gelu_tanh", "swiglu_clamped"):
        raise ValueError(f"unknown gated activation {kind!r}")
    out = torch.empty((rows, cols // 2), dtype=x.dtype)
    _core.cpu_activation(kind, True, x_matrix, (out.data_ptr(), element, rows, cols // 2))
    return out
