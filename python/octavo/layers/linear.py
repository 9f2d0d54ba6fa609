"""Linear: y = x W^T + b, for one weight or several stacked along their rows, or a rank's part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Stored, Weight
from octavo.layers.norm import Addend, Parts, RMSNorm


class Linear:
    """A projection whose weight is prepared for the device.

    ``parts``: [N1, K], [N2, K], ... of the same input, stacked into one [N, K] (a fused QKV);
    ``bias``: [N] or None. ``partial``: K is one rank's part of the input, and the result is the sum
    over all ranks, each of which takes part in it; the bias is rank 0's.

    A block's sum may be left to the norm after it: ``add`` returns an addend beside the residual,
    and ``normed`` and ``RMSNorm.add`` take the two.
    """

    __slots__ = ("_linear", "_reduce", "bias", "weight")

    def __init__(
        self,
        ops: OpSet,
        parts: Sequence[Stored],
        bias: Tensor | None = None,
        *,
        partial: bool = False,
    ) -> None:
        self.weight: Weight = ops.weight(parts)
        self._linear = self.weight.linear
        self._reduce = ops.rank.reduce if partial and ops.rank.size > 1 else None
        self.bias = bias if self._reduce is None or ops.rank.rank == 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        y = self._linear(x, self.bias)
        return y if self._reduce is None else self._reduce(y)

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, gate: str = ""
    ) -> tuple[Tensor, Tensor]:
        """(projection of norm(residual + x), residual + x); may write the sum into ``residual``.

        ``gate``: activation of a gated MLP, whose gate and up rows this stacks; "": none.
        """
        if x is None:
            return self._linear(residual, self.bias, norm=norm.spec, gate=gate), residual
        if isinstance(x, Tensor):
            y = self.weight.linear_of_sum(x, residual, norm.spec, self.bias, gate=gate)
            if y is not None:
                return y, residual
        normed, residual = norm.add(x, residual)
        return self._linear(normed, self.bias, gate=gate), residual

    def add(self, x: Tensor, residual: Tensor) -> tuple[Addend, Tensor]:
        """(addend, residual), [T, N] each: the projection, still to be added to the residual.

        The addend is None where the projection itself adds it, for less than the next norm would.
        """
        if self._reduce is not None:
            return Parts(self._linear(x, self.bias)), residual
        if self.weight.adds_residual(x.shape[0]):
            return None, self._linear(x, self.bias, residual=residual)
        return self._linear(x, self.bias), residual

    def spec(self) -> tuple[Weight, Tensor | None]:
        """(weight, bias), as ``kernels.decoder`` takes them."""
        return self.weight, self.bias
