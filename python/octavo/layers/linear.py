"""Linear: y = x W^T + b, for one weight or several stacked along their rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.kernels.packed import QuantTensor
from octavo.layers.ops import Ops, Weight


class Linear:
    """A projection whose weight is prepared for the device.

    ``weights``: [N1, K], [N2, K], ... of the same input, stacked into one [N, K] (a fused QKV);
    ``bias``: [N] or None; ``exact``: quantized weights meet float activations, never int8 ones.
    """

    __slots__ = ("_linear", "bias", "weight")

    def __init__(
        self,
        ops: Ops,
        weights: Sequence[Tensor | QuantTensor],
        bias: Tensor | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self._linear = ops.linear
        one = weights[0] if len(weights) == 1 else weights
        self.weight: Weight = ops.prepare_linear(one, exact=exact)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return self._linear(x, self.weight, self.bias)

    def spec(self) -> tuple[Weight, Tensor | None]:
        """(weight, bias), as ``kernels.decoder`` takes them."""
        return self.weight, self.bias
