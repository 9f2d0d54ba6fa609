"""Mesh: the shards of one model, and how they exchange what each has computed.

Each rank runs the same program on its own part of the weights and meets the others at every
exchange. How that is driven from the one engine thread depends on where the shards are, and is an
``Exchange``: ``NoExchange`` for a single shard, ``LockstepExchange`` for several on one CPU,
``PeerExchange`` for GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

from torch import Tensor

from octavo.kernels.rank import Rank
from octavo.kernels.weights import Norm

S = TypeVar("S")
R = TypeVar("R")
P = ParamSpec("P")


class AddNorm(Protocol):
    """Rank.add_norm, for a rank that is named."""

    def __call__(
        self, x: Tensor, residual: Tensor, norm: Norm, rank: int
    ) -> tuple[Tensor, Tensor]: ...


class Exchange(Protocol):
    """Runs the ranks' programs and lets them meet.

    ``all_reduce``, ``gather`` and ``barrier`` are called within ``run``, by every rank, in the same
    order and with tensors of the same shape; ``add_norm``, where there is one, likewise. A rank may
    do as it likes with what it gets back.
    """

    size: int

    @property
    def add_norm(self) -> AddNorm | None:
        """Rank's, with the rank as the last argument."""

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """Run one program for each rank, to the end: what they return, by rank.

        Raises:
            Exception: the first that a program raised; the others have ended too.
        """

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """The ranks' sum, added in their order in float32: every rank gets the same bits."""

    def gather(self, tensor: Tensor, columns: int, rank: int) -> Tensor:
        """[..., a share of the columns] of each rank -> [..., columns], in their order."""

    def barrier(self, rank: int) -> None:
        """Return once every rank has come here."""

    def has_lost_a_rank(self) -> bool:
        """True once a rank has waited in vain for another: what was computed since is wrong."""


class Mesh(Generic[S]):
    """Shards by rank. What they are is up to the caller: parts of a model, or all a GPU owns."""

    def __init__(self, shards: Sequence[S], exchange: Exchange) -> None:
        if len(shards) != exchange.size:
            raise ValueError(f"{len(shards)} shards for an exchange between {exchange.size}")
        self.shards = tuple(shards)
        self.exchange = exchange

    @property
    def lead(self) -> S:
        """Rank 0: the shard whose results are read."""
        return self.shards[0]

    def map(self, make: Callable[[S], R]) -> Mesh[R]:
        """A mesh of what ``make`` makes of each shard, with the same exchange."""
        return Mesh([make(shard) for shard in self.shards], self.exchange)

    def each(
        self, program: Callable[Concatenate[S, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Run ``program(shard, *args)`` for every shard, which may exchange in it: by rank."""
        programs = [functools.partial(program, shard, *args, **kwargs) for shard in self.shards]
        return self.exchange.run(programs)


def ranks_of(exchange: Exchange) -> list[Rank]:
    """Each shard's place, for the layers of its part of the model."""
    fused = exchange.add_norm
    return [
        Rank(
            rank,
            exchange.size,
            reduce=functools.partial(exchange.all_reduce, rank=rank),
            gather=functools.partial(exchange.gather, rank=rank),
            add_norm=None if fused is None else functools.partial(fused, rank=rank),
        )
        for rank in range(exchange.size)
    ]


class NoExchange:
    """The Exchange of a mesh of one."""

    size = 1
    add_norm: AddNorm | None = None

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """Call the only program."""
        [program] = programs
        return [program()]

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor, columns: int, rank: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def barrier(self, rank: int) -> None:
        """Return at once."""

    def has_lost_a_rank(self) -> bool:
        """False: it waits for none."""
        return False
