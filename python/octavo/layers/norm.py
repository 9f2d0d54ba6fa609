"""RMSNorm and LayerNorm, with the residual addition that precedes them in every block.

A block's addend may be handed on in ``Parts``: the next norm then adds up the ranks' parts, the
residual and its own square sums at once, where a mesh can do that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.rank import Rank
from octavo.kernels.weights import Norm, Range


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A tensor that is still to be added up over the ranks. ``own``: this rank's part, [T, D]."""

    own: Tensor


# What a block leaves to be added to the residual.
Addend: TypeAlias = Tensor | Parts | None


class RMSNorm:
    """y = x / rms(x) * (weight_offset + weight). ``weight``: [D]."""

    __slots__ = ("_rank", "_rms_norm", "spec")

    def __init__(self, ops: OpSet, weight: Tensor, eps: float, weight_offset: float = 0.0) -> None:
        self._rms_norm = ops.rms_norm
        self._rank = ops.rank
        # As a projection takes a norm before it.
        self.spec = Norm(weight, eps, weight_offset)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        weight, eps, offset = self.spec
        return cast(Tensor, self._rms_norm(x, weight, eps, weight_offset=offset))

    def add(self, x: Addend, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x); may write the sum into ``residual``.

        Without an x there is nothing to add.
        """
        if x is None:
            return self(residual), residual
        if isinstance(x, Parts):
            if self._rank.add_norm is not None:
                return self._rank.add_norm(x.own, residual, self.spec)
            x = self._rank.reduce(x.own)
        weight, eps, offset = self.spec
        pair = self._rms_norm(x, weight, eps, residual=residual, weight_offset=offset)
        return cast(tuple[Tensor, Tensor], pair)


class LayerNorm:
    """y = (x - mean(x)) / deviation(x) * weight + bias. ``weight``: [D]; ``bias``: [D] or None."""

    __slots__ = ("_layer_norm", "_rank", "bias", "eps", "weight")

    def __init__(self, ops: OpSet, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._layer_norm = ops.layer_norm
        self._rank = ops.rank
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return cast(Tensor, self._layer_norm(x, self.weight, self.bias, self.eps))

    def add(self, x: Addend, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x), as ``RMSNorm.add``."""
        if x is None:
            return self(residual), residual
        if isinstance(x, Parts):
            x = self._rank.reduce(x.own)
        pair = self._layer_norm(x, self.weight, self.bias, self.eps, residual=residual)
        return cast(tuple[Tensor, Tensor], pair)

    def spec(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), as ``kernels.encoder`` takes them."""
        return self.weight, self.bias


def added(x: Addend, residual: Tensor, rank: Rank) -> Tensor:
    """residual + x, where no norm follows."""
    if x is None:
        return residual
    return residual + (rank.reduce(x.own) if isinstance(x, Parts) else x)


def normed_part(x: Tensor, norm: RMSNorm, own: Range, rank: Rank, *, copies: int = 1) -> Tensor:
    """A rank's columns ``own`` of a norm over all ranks' columns, of which x [T, own] are its.

    ``copies``: ranks that hold the same columns.
    """
    if rank.size == 1:
        return norm(x)
    parts = rank.gather(x, rank.size * x.shape[1]).view(len(x), rank.size, -1)
    whole = parts[:, ::copies].reshape(len(x), -1).contiguous()
    return norm(whole)[:, slice(*own)].contiguous()
