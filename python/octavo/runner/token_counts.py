"""TokenCounts: which tokens a request has used, for its penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of one request and how often each was generated, kept incrementally.

    ``ids`` int64 [n]: of prompt and output; ``num_output`` float32 [n]: 0 for one that is in the
    prompt alone. Memory is of the distinct tokens, not of the vocabulary.
    """

    __slots__ = ("_ids", "_index", "_num_output")

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._index = {token: i for i, token in enumerate(distinct.tolist())}
        room = len(distinct) + 64
        self._ids = np.zeros(room, np.int64)
        self._ids[: len(distinct)] = distinct
        self._num_output = np.zeros(room, np.float32)
        for token in output_token_ids:
            self.add(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        """[n], a view."""
        return self._ids[: len(self._index)]

    @property
    def num_output(self) -> NDArray[np.float32]:
        """[n], a view."""
        return self._num_output[: len(self._index)]

    def add(self, token: int) -> None:
        """One more token was generated. Amortized O(1)."""
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._num_output = np.concatenate([self._num_output, np.zeros_like(self._num_output)])
        self._ids[at] = token
        self._num_output[at] += 1
