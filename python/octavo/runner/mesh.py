"""Mesh: the shards of one model, and how they exchange what each has computed.

Each rank runs the same program on its own part of the weights and meets the others at every
exchange. How that is driven from the one engine thread depends on where the shards are, and is an
``Exchange``: ``NoExchange`` for a single shard, ``LockstepExchange`` for several on one CPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from octavo.kernels.rank import Rank

S = TypeVar("S")
R = TypeVar("R")
P = ParamSpec("P")


class Exchange(Protocol):
    """Runs the ranks' programs and lets them meet.

    ``all_reduce``, ``gather`` and ``barrier`` are called within ``run``, by every rank, in the same
    order and with tensors of the same shape. A rank may do as it likes with what it gets back.
    """

    size: int

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """Run one program for each rank, to the end: what they return, by rank.

        Raises:
            Exception: the first that a program raised; the others have ended too.
        """

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """The ranks' sum, added in their order in float32: every rank gets the same bits."""

    def gather(self, tensor: Tensor, rank: int) -> Tensor:
        """[..., N] of each rank -> [..., size * N], in their order."""

    def barrier(self, rank: int) -> None:
        """Return once every rank has come here."""


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
    return [
        Rank(
            rank,
            exchange.size,
            reduce=functools.partial(exchange.all_reduce, rank=rank),
            gather=functools.partial(exchange.gather, rank=rank),
        )
        for rank in range(exchange.size)
    ]


class NoExchange:
    """The Exchange of a mesh of one."""

    size = 1

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """Call the only program."""
        [program] = programs
        return [program()]

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def barrier(self, rank: int) -> None:
        """Return at once."""


class _Round:
    """One run of all programs: whose turn it is, and what has been handed in."""

    def __init__(self, size: int) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(size)]
        self.parts: list[Tensor | None] = [None] * size
        self.result: Tensor | None = None
        self.num_met = 0  # exchanges that are complete
        self.num_ended = 0
        self.has_begun = False
        self.error: BaseException | None = None


class _OtherRankFailed(Exception):
    """Ends a program whose exchange will never be complete."""


class LockstepExchange:
    """Several ranks on one CPU, a thread each, of which only one runs at any time.

    A rank runs up to its next exchange, hands in its tensor and gives the turn to the next; the
    last one combines what all have handed in. So the kernels' thread pool serves one rank at a
    time, with all cores, and a run is as deterministic as a loop over the ranks.
    """

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError("an exchange needs two ranks or more")
        self.size = size
        # Rank 0 is the caller's thread.
        self._workers = ThreadPoolExecutor(size - 1, thread_name_prefix="octavo-rank")
        self._round = _Round(size)

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """As Exchange.run. Thread-local state, such as inference mode, is each program's own."""
        if len(programs) != self.size:
            raise ValueError(f"{len(programs)} programs for {self.size} ranks")
        round_ = self._round = _Round(self.size)
        others = [
            self._workers.submit(self._run_one, rank, program)
            for rank, program in enumerate(programs)
            if rank
        ]
        round_.has_begun = True
        round_.turns[0].release()
        ended = [self._run_one(0, programs[0]), *(other.result() for other in others)]
        if round_.error is not None:
            raise round_.error
        return [result for results in ended for result in results]

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """As Exchange.all_reduce."""
        return self._meet(tensor, rank, _add_up)

    def gather(self, tensor: Tensor, rank: int) -> Tensor:
        """As Exchange.gather."""
        return self._meet(tensor, rank, _join)

    def barrier(self, rank: int) -> None:
        """As Exchange.barrier."""
        self._meet(torch.empty(0), rank, _join)

    def _run_one(self, rank: int, program: Callable[[], R]) -> list[R]:
        """[what the program returns]; [] where it, or another, has failed."""
        round_ = self._round
        round_.turns[rank].acquire()
        try:
            return [] if round_.error is not None else [program()]
        except _OtherRankFailed:
            return []
        except BaseException as error:  # raised again by ``run``
            round_.error = round_.error or error
            return []
        finally:
            round_.num_ended += 1
            self._give_turn(rank)

    def _give_turn(self, rank: int) -> None:
        self._round.turns[(rank + 1) % self.size].release()

    def _meet(self, tensor: Tensor, rank: int, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        round_ = self._round
        if round_.num_ended or not round_.has_begun:
            raise RuntimeError(f"rank {rank} begins an exchange that not every rank takes part in")
        met_before = round_.num_met
        round_.parts[rank] = tensor
        is_last = rank == self.size - 1
        if is_last:
            round_.result = combine([part for part in round_.parts if part is not None])
            round_.num_met += 1
        self._give_turn(rank)
        round_.turns[rank].acquire()
        if round_.error is not None:
            raise _OtherRankFailed
        if round_.num_met == met_before:
            raise RuntimeError(f"rank {rank} waits in an exchange, and others have ended")
        assert round_.result is not None
        # The others' copies are made before the last rank, which has its turn after them.
        return round_.result if is_last else round_.result.clone()


def _add_up(parts: list[Tensor]) -> Tensor:
    total = parts[0].float().clone()
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)
