"""PromptLogprobs: log probabilities of a prompt's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Candidates = list[tuple[int, float, int]]


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log probabilities of a prompt's tokens, each given those before it.

    One row for each of the prompt's tokens but the first, which nothing precedes: R rows, and k
    alternatives in each.

    Args:
        ids: int32 [R, 1 + k]; the prompt's own token, then the k most likely ones in order.
        logprobs: float32 [R, 1 + k], of the same tokens.
        ranks: int32 [R], of the prompt's own token in the vocabulary; 1 is the most likely.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]

    def __len__(self) -> int:
        """The number of rows: the prompt's length - 1."""
        return len(self.ids)

    def positions(self, num_logprobs: int | None = None) -> list[Candidates]:
        """(token id, logprob, rank) per row, the prompt's own token first, then the best ones.

        Args:
            num_logprobs: the most alternatives to return; None is all.
        """
        width = self.ids.shape[1]
        if num_logprobs is not None:
            width = min(width, 1 + num_logprobs)
        rows = zip(
            self.ids[:, :width].tolist(),
            self.logprobs[:, :width].tolist(),
            self.ranks.tolist(),
            strict=True,
        )
        others = range(1, width)
        return [list(zip(ids, values, (rank, *others), strict=True)) for ids, values, rank in rows]
