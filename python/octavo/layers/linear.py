"""Linear: y = x W^T + b, for one weight or several stacked along their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from octavo.kernels.packed import QuantTensor
from octavo.layers.norm import RMSNorm
from octavo.layers.ops import FusedOps, Ops, Weight


class Linear:
    """A projection whose weight is prepared for the device.

    ``weights``: [N1, K], [N2, K], ... of the same input, stacked into one [N, K] (a fused QKV);
    ``bias``: [N] or None; ``exact``: quantized weights meet float activations, never int8 ones.
    """

    __slots__ = ("_fused", "_linear", "bias", "weight")

    def __init__(
        self,
        ops: Ops,
        weights: Sequence[Tensor | QuantTensor],
        bias: Tensor | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self._linear = ops.linear
        self._fused = cast(FusedOps, ops)
        one = weights[0] if len(weights) == 1 else weights
        self.weight: Weight = ops.prepare_linear(one, exact=exact)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return self._linear(x, self.weight, self.bias)

    # Only over an op set that has_fused_ops.

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, N] + this of x, in residual's memory."""
        return self._fused.linear_add(x, self.weight, residual, self.bias)

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """This of norm(x)."""
        return self._fused.norm_linear(
            x, norm.weight, norm.eps, self.weight, self.bias, weight_offset=norm.weight_offset
        )

    def normed_gated(self, x: Tensor, norm: RMSNorm, kind: str) -> Tensor:
        """act(gate) * up of norm(x), where this is gate and up stacked, without bias."""
        return self._fused.norm_gated_linear(
            x, norm.weight, norm.eps, self.weight, kind, weight_offset=norm.weight_offset
        )

    def spec(self) -> tuple[Weight, Tensor | None]:
        """(weight, bias), as ``kernels.decoder`` takes them."""
        return self.weight, self.bias
