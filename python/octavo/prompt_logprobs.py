"""PromptLogprobs: how likely the model found each token of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Candidates = list[tuple[int, float, int]]


class PromptLogprobs:
    """The log probabilities of one prompt, shared by its samples.

    Whoever submits a request makes one and hands it over; the runner fills it, chunk by chunk, on
    the engine's thread. It is complete before the first delta that carries a token, or the last
    one of a request for none.

    Args:
        num_logprobs: how many of the likeliest tokens each position keeps beside its own.
    """

    def __init__(self, num_logprobs: int) -> None:
        self.num_logprobs = num_logprobs
        self._chunks: dict[int, tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]]
        self._chunks = {}
        self._num_recorded = 0

    def record(
        self,
        first: int,
        ids: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int32],
    ) -> None:
        """Take rows of the prompt's tokens ``first``, ``first + 1``, ...

        ids int32 and logprobs float32 [R, 1 + num_logprobs]: the prompt's own token, then the best
        in order. ranks int32 [R], of the prompt's own; 1 is the best. A preempted prompt begins
        anew: the same rows may come again, in other chunks.

        Raises:
            ValueError: rows before these are missing.
        """
        if first > self._num_recorded + 1:
            raise ValueError(f"there are {self._num_recorded} rows before prompt token {first}")
        skipped = max(0, self._num_recorded + 1 - first)
        if skipped < len(ids):
            at = first + skipped
            self._chunks[at] = (ids[skipped:], logprobs[skipped:], ranks[skipped:])
            self._num_recorded = at - 1 + len(ids) - skipped

    @property
    def num_recorded(self) -> int:
        """Rows that are there, of the prompt's length - 1: nothing precedes the first token."""
        return self._num_recorded

    def positions(self, num_logprobs: int | None = None) -> list[Candidates]:
        """(token id, logprob, rank) per row, the prompt's own token first, then the best ones.

        ``num_logprobs``: as many of the best at most; None is all.
        """
        width = 1 + self.num_logprobs
        if num_logprobs is not None:
            width = min(width, 1 + num_logprobs)
        rows: list[Candidates] = []
        for _, (ids, logprobs, ranks) in sorted(self._chunks.items()):
            for row_ids, row, rank in zip(
                ids[:, :width].tolist(), logprobs[:, :width].tolist(), ranks.tolist(), strict=True
            ):
                rows.append(list(zip(row_ids, row, (rank, *range(1, width)), strict=True)))
        return rows
