"""Lockstep: ranks in turns on threads of their own, of which one runs at any time.

A rank runs up to its next meeting, hands in its part and gives the turn to the next; the last one
makes the results of all. So a run is as deterministic as a loop over the ranks, and whatever is
done at a meeting for all ranks is done by one thread, without any other at work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from octavo.kernels.reference import sum_of_ranks
from octavo.runner.mesh import AddNorm

R = TypeVar("R")
T = TypeVar("T")


class _Round:
    """One run of all programs: whose turn it is, and what has been handed in."""

    def __init__(self, size: int) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(size)]
        self.parts: list[Any] = [None] * size
        self.results: Sequence[Any] = ()
        self.num_met = 0  # meetings that are complete
        self.num_ended = 0
        self.has_begun = False
        self.error: BaseException | None = None


class _OtherRankFailed(Exception):
    """Ends a program whose meeting will never be complete."""


class Lockstep:
    """Runs one program for each of ``size`` ranks."""

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError("an exchange needs two ranks or more")
        self.size = size
        # Rank 0 is the caller's thread; every other has its own, for what libraries keep by thread.
        self._workers = [
            ThreadPoolExecutor(1, thread_name_prefix=f"octavo-rank-{rank}")
            for rank in range(1, size)
        ]
        self._round = _Round(size)

    def run(self, programs: Sequence[Callable[[], R]]) -> list[R]:
        """As Exchange.run. Thread-local state, such as inference mode, is each program's own."""
        if len(programs) != self.size:
            raise ValueError(f"{len(programs)} programs for {self.size} ranks")
        round_ = self._round = _Round(self.size)
        others = [
            worker.submit(self._run_one, rank, programs[rank])
            for rank, worker in enumerate(self._workers, 1)
        ]
        round_.has_begun = True
        round_.turns[0].release()
        ended = [self._run_one(0, programs[0]), *(other.result() for other in others)]
        self._round = _Round(self.size)  # nothing of it is kept
        if round_.error is not None:
            raise round_.error
        return [result for results in ended for result in results]

    def barrier(self, rank: int) -> None:
        """As Exchange.barrier."""
        self.meet(None, rank, lambda parts: parts)

    def has_lost_a_rank(self) -> bool:
        """False: a rank that fails ends the run."""
        return False

    def meet(self, part: T, rank: int, combine: Callable[[list[T]], Sequence[R]]) -> R:
        """This rank's result of ``combine(parts by rank)``, which the last rank calls.

        Raises:
            RuntimeError: not every rank takes part.
        """
        round_ = self._round
        if round_.num_ended or not round_.has_begun:
            raise RuntimeError(f"rank {rank} begins an exchange that not every rank takes part in")
        met_before = round_.num_met
        round_.parts[rank] = part
        if rank == self.size - 1:
            round_.results = combine(round_.parts)
            round_.num_met += 1
        self._give_turn(rank)
        round_.turns[rank].acquire()
        if round_.error is not None:
            raise _OtherRankFailed
        if round_.num_met == met_before:
            raise RuntimeError(f"rank {rank} waits in an exchange, and others have ended")
        result: R = round_.results[rank]
        return result

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


class LockstepExchange(Lockstep):
    """The Exchange of several ranks on one CPU: the kernels' threads serve one rank at a time."""

    add_norm: AddNorm | None = None

    def all_reduce(self, tensor: Tensor, rank: int) -> Tensor:
        """As Exchange.all_reduce."""
        return self.meet(tensor, rank, _add_up)

    def gather(self, tensor: Tensor, columns: int, rank: int) -> Tensor:
        """As Exchange.gather."""
        del columns
        return self.meet(tensor, rank, _join)


def _add_up(parts: list[Tensor]) -> list[Tensor]:
    return _for_each(sum_of_ranks(parts), len(parts))


def _join(parts: list[Tensor]) -> list[Tensor]:
    return _for_each(torch.cat(parts, dim=-1), len(parts))


def _for_each(result: Tensor, size: int) -> list[Tensor]:
    """A rank may change what it gets."""
    return [result, *(result.clone() for _ in range(size - 1))]
