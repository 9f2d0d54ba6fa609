"""QuantizedWeight: what quantized weights share on a GPU: prologue, epilogue, rows, large steps."""

from __future__ import annotations

from abc import abstractmethod

import torch

from ..weights import Norm, Weight
from .activation import gated_activation
from .launch import check_shape, check_tensors
from .linear import add_product, check_epilogue, dense_product
from .norm import rms_norm


class QuantizedWeight(Weight):
    """A weight [N, K] in 4 or 8 bits, multiplied by kernels of its own for few rows.

    Steps of many rows, and whatever else has no kernel, go through ``floats``, made anew each time:
    memory for one matrix, and a share of a large product's time.
    """

    __slots__ = ("format", "nbytes", "shape")

    @abstractmethod
    def floats(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] in dtype, in memory of its own."""

    @abstractmethod
    def select(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` (int32 [T]) of the weight, all inside it: float32 [T, K]."""

    @abstractmethod
    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        """residual + x W^T + bias -> y, which may be the residual; False if not for such a step."""

    def whole_row(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: Norm | None,
        gate: str,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        """``linear`` of one row -> y, which may be the residual; False if not for this weight."""
        return False

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
        n, k = self.shape
        rows = x.shape[0]
        check_tensors(x=x, bias=bias, residual=residual)
        check_shape("x", x, rows, k)
        check_epilogue(rows, n, bias, gate, residual)
        if rows == 1:
            width, dtype = n // 2 if gate else n, out_dtype or x.dtype
            y = residual
            if y is None:
                y = torch.empty((1, width), dtype=dtype, device=x.device)
            if self.whole_row(x, bias, norm, gate, residual, y):
                return y
        if norm is not None:
            normed = rms_norm(x, norm.weight, norm.eps, weight_offset=norm.weight_offset)
            assert isinstance(normed, torch.Tensor)
            x = normed
        if gate:
            gated = gated_activation(self._product(x, bias, None, x.dtype), gate)
            return gated if residual is None else residual.add_(gated)
        return self._product(x, bias, residual, out_dtype or x.dtype)

    def _product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        rows, n = x.shape[0], self.shape[0]
        y = residual
        if y is None:
            y = torch.empty((rows, n), dtype=dtype, device=x.device)
        if not rows or self.product(x, bias, residual, y):
            return y
        weight = self.floats(x.dtype)
        if residual is not None:
            return add_product(x, weight, bias, residual, rows, n)
        return dense_product(x, weight, bias, rows, n, dtype)

    def rows(
        self, ids: torch.Tensor, scale: float = 1.0, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        # An id outside the table (a padded row's leftover) reads zeros, never foreign memory.
        inside = (ids >= 0) & (ids < self.shape[0])
        found = self.select(torch.where(inside, ids, 0)) * scale
        return found.masked_fill_(~inside[:, None], 0.0).to(out_dtype or torch.float32)

    def dequantize(self) -> torch.Tensor:
        return self.floats(torch.float32)
