"""Sampler: logits to tokens, row by row as each request asked, on the host.

The order is vLLM's: allowed ids, bad words of one token, min_tokens, logit bias, penalties, and
last of all the masks of grammars and of longer bad words; then the maximum, or temperature, min-p,
top-k, top-p and one draw. Log probabilities are of the raw logits, unless the operator wants them
of what is drawn from (``LogprobsMode``). A row's token depends on its own
logits, its request's seed and how many tokens came before: never on what else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.slots import NUM_PROMPT_TOKENS, TEMPERATURE
from octavo.runner.draw import Floats, Ints, draw, uniforms
from octavo.runner.logprobs import RAW_LOGPROBS, LogprobsMode, NamedTokens, processed_logits
from octavo.runner.masks import Masks
from octavo.runner.request_state import RequestState
from octavo.runner.slots import SlotRecords, column_of, seeds_of
from octavo.runner.token_counts import TokenCounts

# Results that are no tokens, by request id: each leaves with that sample's next delta.
Extras = Sequence[tuple[int, object]]


class SampledTokens(NamedTuple):
    """One step's results, on the host. S rows; C = 1 + the most logprobs any row asked for.

    ``logprob_ids`` int32 [S, C] and ``logprobs`` float32 [S, C]: the chosen token first, then the
    best in order; rows that asked for fewer, or for none, carry more than they need. ``ranks``
    int32 [S]: of the chosen token, 1 is the best. ``extras``: prompt log probabilities that are
    complete, or pooled vectors.
    """

    token_ids: NDArray[np.int32]
    logprob_ids: NDArray[np.int32] | None = None
    logprobs: NDArray[np.float32] | None = None
    ranks: NDArray[np.int32] | None = None
    extras: Extras | None = None


class _SlotState:
    """One slot's changes to its logits, as arrays where they are used every step."""

    __slots__ = ("allowed", "banned", "banned_early", "bias", "counts", "state")

    def __init__(self, state: RequestState) -> None:
        params = state.params
        self.state = state
        self.allowed = np.array(params.allowed_token_ids, np.int64)
        self.banned = state.banned_token_ids
        early = {*state.eos_token_ids, *params.stop_token_ids} if params.min_tokens else ()
        self.banned_early = np.array([*early], np.int64)
        self.bias = (
            np.array([*params.logit_bias.keys()], np.int64),
            np.array([*params.logit_bias.values()], np.float32),
        )
        self.counts: TokenCounts | None = None
        if state.has_penalties:
            # Only a repetition penalty counts the prompt.
            repeats = params.repetition_penalty != 1.0
            prompt = state.prompt_token_ids if repeats else ()
            self.counts = TokenCounts(prompt, state.output_token_ids)

    @property
    def processes(self) -> bool:
        """True if anything but temperature and its kind changes the logits."""
        parts = (self.allowed, self.banned, self.banned_early, self.bias[0])
        return any(len(part) for part in parts) or self.tracks_output

    @property
    def tracks_output(self) -> bool:
        """True if the tokens sampled so far matter."""
        return self.counts is not None


class Sampler:
    """Sampling state by slot. ``seed``: of requests that bring none."""

    def __init__(self, max_num_seqs: int, seed: int, mode: LogprobsMode = RAW_LOGPROBS) -> None:
        self._random = random.Random(seed)
        self._mode = mode
        n = max_num_seqs
        self._slots: list[_SlotState | None] = [None] * n
        # Not plain greedy: the one test that a step of greedy requests takes.
        self._special = np.zeros(n, bool)
        self._processes = np.zeros(n, bool)
        self._tracks = np.zeros(n, bool)
        self._records = SlotRecords(n)
        self._num_logprobs = np.full(n, -1, np.int64)
        # Slots whose request names the tokens that it wants log probabilities of.
        self._names_tokens = np.zeros(n, bool)

    def admit(self, slot: int, state: RequestState) -> None:
        """A request starts in this slot, or starts again after a preemption."""
        if state.seed is None:
            state.seed = self._random.getrandbits(64)
        params = state.params
        slot_state = _SlotState(state)
        self._slots[slot] = slot_state
        self._records.write(slot, state)
        num_logprobs = params.num_logprobs
        self._num_logprobs[slot] = -1 if num_logprobs is None else num_logprobs
        self._names_tokens[slot] = bool(params.logprob_token_ids)
        self._processes[slot] = slot_state.processes
        self._tracks[slot] = slot_state.tracks_output
        self._special[slot] = not params.greedy or slot_state.processes or num_logprobs is not None

    def sample(
        self,
        logits: Tensor,
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        masks: Masks | None = None,
    ) -> SampledTokens:
        """One token a row; -1 where its mask leaves none.

        logits: float32 [S, V]; may be overwritten. slots: int32 [S]. positions: int32 [S], of the
        token each row's logits follow.
        """
        raw: Floats = logits.cpu().numpy()
        if masks is None and not self._special[slots].any():
            return SampledTokens(raw.argmax(-1).astype(np.int32))
        records = self._records.rows[slots]
        num_outputs: Ints = positions + np.int64(1) - column_of(records, NUM_PROMPT_TOKENS)
        wanted = self._num_logprobs[slots]
        processed = raw
        without_any: list[int] = []
        if masks is not None or self._processes[slots].any():
            keeps_raw = wanted.max() >= 0 and not self._mode.is_processed
            processed = raw.copy() if keeps_raw else np.ascontiguousarray(raw)
            self._process(processed, slots, num_outputs)
            if masks is not None:
                without_any = masks.apply(processed)
                # Whatever is drawn there is not taken.
                processed[without_any] = 0.0
        drawn = np.flatnonzero(column_of(records, TEMPERATURE) > 0)
        if len(drawn) < len(slots):
            token_ids = processed.argmax(-1).astype(np.int32)
        else:
            token_ids = np.empty(len(slots), np.int32)
        if len(drawn):
            chosen = records[drawn]
            uniform = uniforms(seeds_of(chosen), num_outputs[drawn])
            token_ids[drawn] = draw(processed[drawn], chosen, uniform)
        token_ids[without_any] = -1
        for row in np.flatnonzero(self._tracks[slots]).tolist():
            self._track(slots[row], int(token_ids[row]))
        if wanted.max() < 0:
            return SampledTokens(token_ids)
        if self._mode.is_processed:
            chosen_ids = torch.from_numpy(token_ids)
            raw = processed_logits(torch.from_numpy(processed), records, chosen_ids).numpy()
        return _with_logprobs(
            raw, token_ids, wanted, self._named(slots), normalizes=self._mode.normalizes
        )

    def _named(self, slots: NDArray[np.int32]) -> list[NamedTokens]:
        """The rows whose request names the tokens to report."""
        found = []
        for row in np.flatnonzero(self._names_tokens[slots]).tolist():
            slot = self._slots[slots[row]]
            assert slot is not None
            found.append(NamedTokens(row, slot.state.params.logprob_token_ids))
        return found

    def _process(self, logits: Floats, slots: NDArray[np.int32], num_outputs: Ints) -> None:
        """Everything that changes logits before the maximum is taken, in place."""
        for row in np.flatnonzero(self._processes[slots]).tolist():
            slot = self._slots[slots[row]]
            assert slot is not None
            _mask(logits[row], slot, int(num_outputs[row]))
            ids, bias = slot.bias
            logits[row][ids] += bias
            if slot.counts is not None:
                _penalize(logits[row], slot)

    def _track(self, slot: int, token: int) -> None:
        slot_state = self._slots[slot]
        assert slot_state is not None
        if token < 0:
            return
        slot_state.state.output_token_ids.append(token)
        if slot_state.counts is not None:
            slot_state.counts.add(token)


def _mask(row: Floats, slot: _SlotState, num_outputs: int) -> None:
    """Allowed ids, bad words and min_tokens on one row [V], in place."""
    if len(slot.allowed):
        kept = row[slot.allowed]
        row.fill(-np.inf)
        row[slot.allowed] = kept
    banned = slot.banned
    if num_outputs < slot.state.params.min_tokens:
        banned = banned + slot.banned_early.tolist()
    if banned:
        before = row[banned]
        row[banned] = -np.inf
        # What a request forbids and what it allows may leave nothing; it still gets a token.
        if row.max() == -np.inf:
            row[banned] = before


def _penalize(row: Floats, slot: _SlotState) -> None:
    """Repetition, frequency and presence penalties on one row [V], in place."""
    counts, p = slot.counts, slot.state.params
    assert counts is not None
    values, count = row[counts.ids], counts.num_output
    values *= np.where(values > 0, 1 / p.repetition_penalty, p.repetition_penalty)
    values -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    row[counts.ids] = values


def _with_logprobs(
    raw: Floats,
    token_ids: NDArray[np.int32],
    wanted: Ints,
    named: Sequence[NamedTokens],
    *,
    normalizes: bool,
) -> SampledTokens:
    """Log probabilities of the rows that ask for them, scattered among all rows."""
    all_rows = raw
    num_rows, most = len(token_ids), int(wanted.max())
    rows = np.flatnonzero(wanted >= 0)
    if len(rows) < num_rows:
        raw = raw[rows]
    chosen = token_ids[rows].astype(np.int64)[:, None]
    logits = torch.from_numpy(raw)
    best, best_ids = logits.topk(most, dim=-1)
    logit = np.take_along_axis(raw, chosen, axis=1)
    ids = np.zeros((num_rows, 1 + most), np.int32)
    logprobs = np.zeros((num_rows, 1 + most), np.float32)
    ranks = np.zeros(num_rows, np.int32)
    ids[rows] = np.concatenate([chosen, best_ids.numpy()], axis=1)
    logprobs[rows] = np.concatenate([logit, best.numpy()], axis=1)
    for row, tokens in named:
        ids[row, 1 : 1 + len(tokens)] = tokens
        logprobs[row, 1 : 1 + len(tokens)] = all_rows[row, list(tokens)]
    if normalizes:
        logprobs[rows] -= logits.logsumexp(-1, keepdim=True).numpy()
    ranks[rows] = np.count_nonzero(raw > logit, axis=1) + 1
    return SampledTokens(token_ids, ids, logprobs, ranks)
