"""Rank: one shard's place in a mesh, as the layers of its part of the model see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of ``size`` parts of each split weight a shard holds, and its exchanges with the rest.

    A linear split by columns needs no exchange; one split by rows computes a partial sum of the
    whole output, which ``reduce`` completes. All ranks must make the same exchanges in the same
    order. A mesh of one exchanges nothing: both return their argument.
    """

    rank: int
    size: int
    reduce: Callable[[Tensor], Tensor]  # the sum over all ranks, the same bits on each
    gather: Callable[[Tensor], Tensor]  # all ranks' tensors side by side along the last dimension
