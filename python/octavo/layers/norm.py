"""RMSNorm and LayerNorm, with the residual addition that precedes them in every block."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from octavo.layers.ops import Ops


class RMSNorm:
    """y = x / rms(x) * (weight_offset + weight). ``weight``: [D]."""

    __slots__ = ("_rms_norm", "eps", "weight", "weight_offset")

    def __init__(self, ops: Ops, weight: Tensor, eps: float, weight_offset: float = 0.0) -> None:
        self._rms_norm = ops.rms_norm
        self.weight = weight
        self.eps = eps
        self.weight_offset = weight_offset

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        y = self._rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)
        return cast(Tensor, y)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); may write the sum into ``residual``."""
        pair = self._rms_norm(
            x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset
        )
        return cast(tuple[Tensor, Tensor], pair)


class LayerNorm:
    """y = (x - mean(x)) / deviation(x) * weight + bias. ``weight``: [D]; ``bias``: [D] or None."""

    __slots__ = ("_layer_norm", "bias", "eps", "weight")

    def __init__(self, ops: Ops, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._layer_norm = ops.layer_norm
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return cast(Tensor, self._layer_norm(x, self.weight, self.bias, self.eps))

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); may write the sum into ``residual``."""
        pair = self._layer_norm(x, self.weight, self.bias, self.eps, residual=residual)
        return cast(tuple[Tensor, Tensor], pair)

    def spec(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), as ``kernels.encoder`` takes them."""
        return self.weight, self.bias
