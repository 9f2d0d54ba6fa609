"""PromptRows: the scored rows of one prompt, gathered step by step until they are complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.prompt_logprobs import PromptLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PromptRows:
    """Gathers a prompt's log probabilities for all samples of its request.

    Samples share their prompt's blocks, so that any of them may compute a row. Used by the engine's
    thread alone.

    Args:
        request_ids: the samples.
        num_rows: the prompt's length - 1.
        num_logprobs: alternatives in each row.
    """

    __slots__ = ("_chunks", "_num_added", "num_logprobs", "num_rows", "request_ids")

    def __init__(self, request_ids: range, num_rows: int, num_logprobs: int) -> None:
        self.request_ids = request_ids
        self.num_rows = num_rows
        self.num_logprobs = num_logprobs
        self._chunks: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]] = []
        # -1: not even the start has come. A prompt of one token has no row, and completes there.
        self._num_added = -1

    @property
    def is_complete(self) -> bool:
        """True if nothing is missing."""
        return self._num_added == self.num_rows

    def add(
        self,
        first: int,
        ids: NDArray[np.int32],
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int32],
    ) -> PromptLogprobs | None:
        """Take rows of the prompt's tokens ``first``, ``first + 1``, ...; see PromptLogprobs.

        A preempted prompt is computed again: rows that have come before are skipped.

        Returns:
            All rows, once: when the last of them has come.

        Raises:
            ValueError: rows before these are missing.
        """
        if self.is_complete:
            return None
        num_added = max(self._num_added, 0)
        if first > num_added + 1:
            raise ValueError(f"there are {num_added} rows before prompt token {first}")
        skipped = num_added + 1 - first
        if skipped < len(ids):
            self._chunks.append((ids[skipped:], logprobs[skipped:], ranks[skipped:]))
            num_added = first - 1 + len(ids)
        self._num_added = num_added
        if num_added < self.num_rows:
            return None
        all_ids, all_logprobs, all_ranks = zip(
            *self._chunks or [(ids, logprobs, ranks)], strict=True
        )
        self._chunks.clear()
        return PromptLogprobs(
            np.concatenate(all_ids), np.concatenate(all_logprobs), np.concatenate(all_ranks)
        )
