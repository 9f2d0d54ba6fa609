"""PromptScorer: log probabilities of prompts, as their chunks are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from octavo.runner.logprobs import LogprobsMode, copy_logprobs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo._core import ScheduledBatch
    from octavo.runner.prompt_rows import PromptRows
    from octavo.runner.request_state import RequestState
    from octavo.runner.sampler import Extras

# Logits of a whole prefill chunk would be gigabytes: 8192 tokens of a vocabulary of 128k are 4 GiB.
MAX_LOGITS_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Rows of one step, each of which the next token of a prompt follows.

    ``first``: the prompt's token that follows the first of ``num_rows`` rows, the plan's ``row``.
    """

    state: RequestState
    first: int
    row: int
    num_rows: int


def moved(spans: Sequence[PromptSpan], num_decodes: int, decode_rows: int) -> list[PromptSpan]:
    """The plan's rows in the padded step, where prefills come after ``decode_rows``."""
    return [
        span if span.row < num_decodes else replace(span, row=span.row - num_decodes + decode_rows)
        for span in spans
    ]


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Results on the host, or on their way there: see PromptRows.add."""

    rows: PromptRows
    first: int
    ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def extras(self) -> Extras:
        """The results of the prompt's samples, if these rows complete it.

        The device must have come past them.
        """
        rows = self.rows
        scores = rows.add(self.first, self.ids.numpy(), self.logprobs.numpy(), self.ranks.numpy())
        return [] if scores is None else [(request_id, scores) for request_id in rows.request_ids]


class PromptScorer:
    """Computes the log probabilities of prompts, for the requests that ask for them.

    A step that holds such rows is found by ``plan`` and computed by ``score``; ``collected`` takes
    its rows when the step is collected. With another step already launched, what is planned runs
    ahead of what is collected.

    Args:
        compute_logits: hidden rows [R, D] -> float32 [R, V].
        vocab_size: V.
        mode: what is reported; a prompt's tokens are not drawn, and so not processed.
    """

    def __init__(
        self, compute_logits: Callable[[Tensor], Tensor], vocab_size: int, mode: LogprobsMode
    ) -> None:
        self._compute_logits = compute_logits
        self._mode = mode
        self._max_rows = max(1, MAX_LOGITS_BYTES // (4 * vocab_size))
        # Slot -> the request there whose prompt is not planned to its end.
        self.unscored: dict[int, RequestState] = {}

    def admit(self, slot: int, state: RequestState) -> None:
        """A request takes this slot, or takes one again after a preemption."""
        if state.prompt_rows is not None and not state.prompt_rows.is_complete:
            self.unscored[slot] = state
        else:
            self.unscored.pop(slot, None)

    def plan(self, batch: ScheduledBatch, staged: NDArray[np.int32]) -> list[PromptSpan]:
        """The step's rows that are to be scored, in the order of the prompts' tokens."""
        if not self.unscored:
            return []
        slots = staged[batch.slots_offset :][: batch.num_reqs]
        starts = staged[batch.query_start_loc_offset :][: batch.num_reqs + 1]
        positions = staged[batch.positions_offset :]
        spans = []
        for request, slot in enumerate(slots.tolist()):
            if (state := self.unscored.get(slot)) is None:
                continue
            row = int(starts[request])
            first = int(positions[row]) + 1
            # The token after the last position of the prompt is not the prompt's.
            rest = state.num_prompt_tokens - first
            num_rows = min(int(starts[request + 1]) - row, rest)
            if num_rows == rest:
                del self.unscored[slot]
            # A prompt of one token has no rows, which is what completes it.
            if num_rows > 0 or state.num_prompt_tokens == 1:
                spans.append(PromptSpan(state, first, row, num_rows))
        # Samples of one request share their scores: one may begin where another ends.
        return sorted(spans, key=lambda span: span.first)

    def score(self, spans: Sequence[PromptSpan], hidden: Tensor) -> list[ScoredRows]:
        """Begin to score. ``hidden`` [T, D]: of all rows of the spans' step."""
        scored = []
        for span in spans:
            if span.num_rows == 0:
                scored.append(_no_rows(span))
            for at in range(0, span.num_rows, self._max_rows):
                end = min(at + self._max_rows, span.num_rows)
                rows = hidden[span.row + at : span.row + end]
                scored.append(self._score(span.state, span.first + at, rows))
        return scored

    def _score(self, state: RequestState, first: int, hidden: Tensor) -> ScoredRows:
        """``hidden`` [R, D]: of the positions before the prompt's tokens ``first``, ..."""
        rows = state.prompt_rows
        assert rows is not None
        logits = self._compute_logits(hidden)
        tokens = torch.tensor(
            list(state.prompt_token_ids[first : first + len(hidden)]),
            dtype=torch.int64,
            pin_memory=logits.is_cuda,
        )
        own = tokens.to(logits.device, non_blocking=True)
        scored = copy_logprobs(logits, own, rows.num_logprobs, normalizes=self._mode.normalizes)
        return ScoredRows(rows, first, scored.ids, scored.values, scored.ranks)


def collected(scored: Sequence[ScoredRows]) -> Extras:
    """Results that a step's rows complete. The device must have come past them."""
    return [extra for rows in scored for extra in rows.extras()]


def _no_rows(span: PromptSpan) -> ScoredRows:
    rows = span.state.prompt_rows
    assert rows is not None
    ids = torch.empty((0, 1 + rows.num_logprobs), dtype=torch.int32)
    return ScoredRows(rows, span.first, ids, ids.float(), ids[:, 0])
