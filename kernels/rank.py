"""Rank: one shard's place in a mesh, and what it exchanges with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .weights import Norm


@dataclass(frozen=True, slots=True)
class Rank:
    """A shard's part, one of ``size``, of each split weight, and its exchanges with the rest.

    A linear split by columns needs no exchange; one split by rows computes a partial sum of the
    whole output, which ``reduce`` completes. All ranks must make the same exchanges in the same
    order. A mesh of one exchanges nothing: both return their argument.
    """

    rank: int
    size: int
    reduce: Callable[[Tensor], Tensor]  # the sum over all ranks, the same bits on each
    # (tensor, N): all ranks' shares of N columns side by side, as ``weights.share`` shares them.
    gather: Callable[[Tensor, int], Tensor]
    # (x, residual, norm) -> (norm(sum), sum) of the residual and all ranks' x, at once; the sum may
    # be written into the residual. None: ``reduce`` and a norm.
    add_norm: Callable[[Tensor, Tensor, Norm], tuple[Tensor, Tensor]] | None = None
    # A mixture's experts are split over the ranks, each whole; otherwise each one's width is.
    whole_experts: bool = False

    def at(self, rank: int, size: int) -> Rank:
        """Another place, with the same exchanges."""
        return replace(self, rank=rank, size=size)


def _itself(tensor: Tensor, columns: int = 0) -> Tensor:
    return tensor


# The only rank of a mesh of one.
ALONE = Rank(0, 1, reduce=_itself, gather=_itself)
