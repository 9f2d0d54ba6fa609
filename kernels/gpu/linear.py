"""linear: a dense projection with its prologue and epilogue, by the number of rows.

- one row: ``gemv_streamed`` with the norm, the gate and the residual inside it, or ``gemv``, with
  them where the weight is small;
- up to skinny.MAX_ROWS and very many weight rows (an output head): ``skinny``;
- many rows of float32: ``linear_f32``;
- otherwise: cuBLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..formats.dense import DENSE_FORMATS
from ..weights import Norm, Weight
from .activation import GATED_KINDS, gated_activation
from .embedding import embedding
from .gemv import MANY_OUTPUTS, gemv
from .gemv_streamed import gemv_streamed
from .launch import check_shape, check_tensors
from .linear_f32 import MIN_ROWS, linear_f32
from .norm import rms_norm
from .skinny import MAX_ROWS, skinny
from .streamed import StreamConfig, plan_streamed

# A norm or a gate inside gemv is computed again by every program. Up to this many inputs that costs
# less than the launch it saves, beyond it more: bench/kernels_gpu.py --only linear. A residual is
# added inside where the norm after it is of such a size, since a norm on its own adds it for free.
MAX_FUSED_SIZE = 2048


def plan_linear(rows: int, outputs: int, dtype: torch.dtype) -> str:
    """The kernel for ``rows`` activations and ``outputs`` weight rows.

    Returns:
        "gemv", "skinny" (it wins where the weight's rows alone fill the GPU many times over, see
        bench/kernels_gpu.py), "f32" or "cublas".
    """
    if rows == 1:
        return "gemv"
    if rows <= MAX_ROWS and outputs >= MANY_OUTPUTS and dtype != torch.float32:
        return "skinny"
    if rows >= MIN_ROWS and dtype == torch.float32:
        return "f32"
    return "cublas"


def plan_row(weight: torch.Tensor) -> StreamConfig | None:
    """The tile of ``gemv_streamed`` for a weight; None where ``gemv`` is for it."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    return plan_streamed(weight.shape[0], weight.shape[1], weight.device)


def _empty_row(n: int, gate: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty((1, n // 2 if gate else n), dtype=dtype, device=device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    gate: str = "",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + gate(norm(x) @ weight.T + bias), weight [N, K]; arguments as Weight.linear's.

    A residual becomes the sum in place.

    Raises:
        ValueError: a wrong shape, layout, type or device, or an unknown gate.
    """
    rows, n, k = _check_linear(x, weight, bias, residual, norm)
    check_epilogue(rows, n, bias, gate, residual)
    tile = plan_row(weight) if rows == 1 else None
    if tile is not None:
        y = residual
        if y is None:
            y = _empty_row(n, gate, out_dtype or x.dtype, x.device)
        return gemv_streamed(
            x, weight, bias, y, config=tile, residual=residual, norm=norm, gate=gate
        )
    if rows == 1 and (k <= MAX_FUSED_SIZE or (norm is None and not gate)):
        y = residual
        if y is None:
            y = _empty_row(n, gate, out_dtype or x.dtype, x.device)
        norm_weight, eps, weight_offset = (None, 0.0, 0.0) if norm is None else norm
        return gemv(
            x,
            weight,
            bias,
            y,
            residual=residual,
            norm_weight=norm_weight,
            eps=eps,
            weight_offset=weight_offset,
            gate=gate,
        )
    if norm is not None:
        normed = rms_norm(x, norm.weight, norm.eps, weight_offset=norm.weight_offset)
        assert isinstance(normed, torch.Tensor)
        x = normed
    if gate:
        gated = gated_activation(dense_product(x, weight, bias, rows, n, x.dtype), gate)
        return gated if residual is None else residual.add_(gated)
    if residual is not None:
        return add_product(x, weight, bias, residual, rows, n)
    return dense_product(x, weight, bias, rows, n, out_dtype or x.dtype)


def dense_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ weight.T + bias [rows, n] in dtype."""
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


def add_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    rows: int,
    n: int,
) -> torch.Tensor:
    """residual + x @ weight.T + bias, written into the residual [rows, n]."""
    way = plan_linear(rows, n, x.dtype)
    if way in ("gemv", "skinny"):
        return (gemv if way == "gemv" else skinny)(x, weight, bias, residual, residual=residual)
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm | None,
) -> tuple[int, int, int]:
    norm_weight = None if norm is None else norm.weight
    check_tensors(x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}")
    rows, k = x.shape
    n = weight.shape[0]
    check_shape("weight", weight, n, k)
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, k)
    return rows, n, k


def check_epilogue(
    rows: int, n: int, bias: torch.Tensor | None, gate: str, residual: torch.Tensor | None
) -> None:
    """Raises ValueError: what follows a product [rows, n] has a wrong shape or an unknown name."""
    if bias is not None:
        check_shape("bias", bias, n)
    if gate and gate not in GATED_KINDS:
        raise ValueError(f"unknown gated activation {gate!r}, known: {', '.join(GATED_KINDS)}")
    if residual is not None:
        check_shape("residual", residual, rows, n // 2 if gate else n)


class GpuWeight(Weight):
    """A dense weight [N, K]."""

    __slots__ = ("format", "nbytes", "shape", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.format = DENSE_FORMATS[tensor.dtype]
        self.nbytes = tensor.nbytes

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        norm: Norm | None = None,
        gate: str = "",
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        return linear(
            x, self.tensor, bias, norm=norm, gate=gate, residual=residual, out_dtype=out_dtype
        )

    def adds_residual(self, rows: int) -> bool:
        return rows == 1 and (self.shape[0] <= MAX_FUSED_SIZE or plan_row(self.tensor) is not None)

    def rows(
        self, ids: torch.Tensor, scale: float = 1.0, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return embedding(ids, self.tensor, scale=scale, out_dtype=out_dtype)

    def dequantize(self) -> torch.Tensor:
        return self.tensor.float()
