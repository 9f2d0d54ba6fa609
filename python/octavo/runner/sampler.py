"""Sampler: logits to tokens, row by row as each request asked.

The order is vLLM's: allowed ids, bad words, min_tokens, logit bias, penalties; then the maximum, or
temperature, min-p, top-k, top-p and one draw. Log probabilities are of the raw logits. A row's
token depends on its own logits, its request's seed and how many tokens came before: never on what
else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.runner.request_state import RequestState
from octavo.runner.token_counts import TokenCounts

_MASK64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Candidates that usually hold a whole nucleus; where they do not, the row is sorted in full.
_NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One step's tokens, on the host. S rows; C = 1 + the most logprobs any row asked for.

    ``logprob_ids`` int32 [S, C] and ``logprobs`` float32 [S, C]: the chosen token first, then the
    best in order; rows that asked for fewer, or for none, carry more than they need. ``ranks``
    int32 [S]: of the chosen token, 1 is the best.
    """

    token_ids: NDArray[np.int32]
    logprob_ids: NDArray[np.int32] | None = None
    logprobs: NDArray[np.float32] | None = None
    ranks: NDArray[np.int32] | None = None


class _SlotState:
    """What one slot's rows go through, as tensors where they are used every step."""

    __slots__ = ("allowed", "banned_early", "bias", "counts", "state")

    def __init__(self, state: RequestState, device: torch.device) -> None:
        params = state.params
        self.state = state

        def ids(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        self.allowed = ids(params.allowed_token_ids) if params.allowed_token_ids else None
        early = {*state.eos_token_ids, *params.stop_token_ids} if params.min_tokens else ()
        self.banned_early = ids(early) if early else None
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), device=device)
            self.bias = ids(params.logit_bias.keys()), values
        self.counts: TokenCounts | None = None
        if state.has_penalties:
            # Only a repetition penalty looks at the prompt.
            repeats = params.repetition_penalty != 1.0
            prompt = state.prompt_token_ids if repeats else ()
            self.counts = TokenCounts(prompt, state.output_token_ids)

    @property
    def processes(self) -> bool:
        """Whether anything but temperature and its kind touches the logits."""
        return (
            self.allowed is not None
            or self.banned_early is not None
            or self.bias is not None
            or self.counts is not None
            or bool(self.state.bad_words_token_ids)
        )

    @property
    def tracks_output(self) -> bool:
        """Whether the tokens sampled so far matter."""
        return self.counts is not None or bool(self.state.bad_words_token_ids)


class Sampler:
    """Sampling state by slot. ``seed``: of requests that bring none."""

    def __init__(self, max_num_seqs: int, device: torch.device, seed: int) -> None:
        self._device = device
        self._random = random.Random(seed)
        n = max_num_seqs
        self._slots: list[_SlotState | None] = [None] * n
        # Not plain greedy: the one look a step of greedy requests takes.
        self._special = np.zeros(n, bool)
        self._processes = np.zeros(n, bool)
        self._tracks = np.zeros(n, bool)
        self._temperature = np.zeros(n, np.float32)
        self._top_k = np.zeros(n, np.int64)
        self._top_p = np.ones(n, np.float64)
        self._min_p = np.zeros(n, np.float32)
        self._seed = np.zeros(n, np.uint64)
        self._num_prompt_tokens = np.zeros(n, np.int64)
        self._num_logprobs = np.full(n, -1, np.int64)

    def admit(self, slot: int, state: RequestState) -> None:
        """A request starts in this slot, or starts again after a preemption."""
        if state.seed is None:
            state.seed = self._random.getrandbits(64)
        params = state.params
        slot_state = _SlotState(state, self._device)
        self._slots[slot] = slot_state
        self._temperature[slot] = 0.0 if params.greedy else params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = np.uint64(state.seed & _MASK64)
        self._num_prompt_tokens[slot] = state.num_prompt_tokens
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._processes[slot] = slot_state.processes
        self._tracks[slot] = slot_state.tracks_output
        self._special[slot] = (
            not params.greedy or slot_state.processes or params.logprobs is not None
        )

    def sample(
        self, logits: Tensor, slots: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> SampledTokens:
        """One token a row.

        logits: float32 [S, V]; may be overwritten. slots: int32 [S]. positions: int32 [S], of the
        token each row's logits follow.
        """
        if not self._special[slots].any():
            return SampledTokens(_to_numpy(logits.argmax(-1)))
        num_outputs = positions + 1 - self._num_prompt_tokens[slots]
        wanted = self._num_logprobs[slots]
        raw = logits
        if self._processes[slots].any():
            if wanted.max() >= 0:
                raw = logits.clone()
            self._process(logits, slots, num_outputs)
        ids = logits.argmax(-1)
        drawn = np.flatnonzero(self._temperature[slots] > 0)
        if len(drawn):
            rows = self._tensor(drawn)
            ids[rows] = self._draw(logits[rows], slots[drawn], num_outputs[drawn])
        token_ids = _to_numpy(ids)
        for row in np.flatnonzero(self._tracks[slots]):
            self._track(int(slots[row]), int(token_ids[row]))
        if wanted.max() < 0:
            return SampledTokens(token_ids)
        return self._with_logprobs(raw, ids, token_ids, wanted)

    # ------------------------------------------------------------------------ logits processors

    def _process(
        self, logits: Tensor, slots: NDArray[np.int32], num_outputs: NDArray[np.int64]
    ) -> None:
        """Everything that changes logits before the maximum is taken, in place."""
        penalized: list[tuple[int, _SlotState]] = []
        for row in np.flatnonzero(self._processes[slots]).tolist():
            slot = self._slots[slots[row]]
            assert slot is not None
            _mask_row(logits[row], slot, int(num_outputs[row]))
            if slot.counts is not None:
                penalized.append((row, slot))
        if penalized:
            self._penalize(logits, penalized)

    def _penalize(self, logits: Tensor, rows: list[tuple[int, _SlotState]]) -> None:
        """Repetition, frequency and presence penalties of all such rows at once."""
        vocab_size = logits.shape[1]
        at, num_output, factors = [], [], []
        for row, slot in rows:
            assert slot.counts is not None
            p, n = slot.state.params, len(slot.counts.ids)
            at.append(slot.counts.ids + row * vocab_size)
            num_output.append(slot.counts.num_output)
            penalties = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            factors.append(np.broadcast_to(np.array(penalties, np.float32), (n, 3)))
        where = self._tensor(np.concatenate(at))
        count = self._tensor(np.concatenate(num_output))
        repetition, frequency, presence = self._tensor(np.concatenate(factors)).unbind(1)
        flat = logits.view(-1)
        values = flat[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[where] = values - frequency * count - presence * (count > 0)

    def _track(self, slot: int, token: int) -> None:
        slot_state = self._slots[slot]
        assert slot_state is not None
        slot_state.state.output_token_ids.append(token)
        if slot_state.counts is not None:
            slot_state.counts.add(token)

    # ------------------------------------------------------------------------------------ draw

    def _draw(
        self, logits: Tensor, slots: NDArray[np.int32], num_outputs: NDArray[np.int64]
    ) -> Tensor:
        """One draw per row of processed logits [R, V]: int64 [R]."""
        uniform = self._tensor(uniforms(self._seed[slots], num_outputs))
        scaled = logits.div_(self._tensor(self._temperature[slots])[:, None])
        scaled -= scaled.amax(-1, keepdim=True)
        min_p = self._min_p[slots]
        if min_p.any():
            with np.errstate(divide="ignore"):
                floor = self._tensor(np.log(min_p))[:, None]
            scaled.masked_fill_(scaled < floor, -torch.inf)
        top_k, top_p = self._top_k[slots], self._top_p[slots]
        filtered = (top_k > 0) & (top_k < logits.shape[1]) | (top_p < 1)
        if not filtered.any():
            return _draw_rows(scaled, uniform)
        ids = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        for which, draw in ((filtered, True), (~filtered, False)):
            if not which.any():
                continue
            rows = self._tensor(np.flatnonzero(which))
            some, some_uniform = scaled[rows], uniform[rows]
            if draw:
                k, p = self._tensor(top_k[which]), self._tensor(top_p[which])
                ids[rows] = _draw_filtered(some, k, p, some_uniform)
            else:
                ids[rows] = _draw_rows(some, some_uniform)
        return ids

    # -------------------------------------------------------------------------------- logprobs

    def _with_logprobs(
        self,
        raw: Tensor,
        ids: Tensor,
        token_ids: NDArray[np.int32],
        wanted: NDArray[np.int64],
    ) -> SampledTokens:
        """Log probabilities of the rows that want them, scattered among all rows."""
        num_rows, most = len(token_ids), int(wanted.max())
        rows = np.flatnonzero(wanted >= 0)
        chosen = ids
        if len(rows) < num_rows:
            index = self._tensor(rows)
            raw, chosen = raw[index], ids[index]
        chosen = chosen[:, None]
        best, best_ids = raw.topk(most, dim=-1)
        logit = raw.gather(-1, chosen)
        total = raw.logsumexp(-1, keepdim=True)
        ranks = (raw > logit).sum(-1) + 1
        out_ids = np.zeros((num_rows, 1 + most), np.int32)
        out_logprobs = np.zeros((num_rows, 1 + most), np.float32)
        out_ranks = np.zeros(num_rows, np.int32)
        out_ids[rows] = torch.cat([chosen, best_ids], -1).cpu().numpy()
        out_logprobs[rows] = (torch.cat([logit, best], -1) - total).cpu().numpy()
        out_ranks[rows] = ranks.cpu().numpy()
        return SampledTokens(token_ids, out_ids, out_logprobs, out_ranks)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), each a hash of (seed, counter); splitmix64's mixer, twice."""
    x = _mix(seeds + _GOLDEN) + counters.astype(np.uint64) * _GOLDEN
    return (_mix(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _to_numpy(ids: Tensor) -> NDArray[np.int32]:
    array: NDArray[np.int32] = ids.to(torch.int32).cpu().numpy()
    return array


def _mask_row(row: Tensor, slot: _SlotState, num_outputs: int) -> None:
    """Allowed ids, bad words, min_tokens and logit bias on one row [V], in place."""
    if slot.allowed is not None:
        kept = row[slot.allowed]
        row.fill_(-torch.inf)
        row[slot.allowed] = kept
    banned = _bad_tokens(slot.state)
    early = slot.banned_early is not None and num_outputs < slot.state.params.min_tokens
    if banned or early:
        before = row.clone()
        if banned:
            row[banned] = -torch.inf
        if early:
            assert slot.banned_early is not None
            row[slot.banned_early] = -torch.inf
        # What the request forbids and what it allows may leave nothing: it must still get a token.
        if not torch.isfinite(row.max()):
            row.copy_(before)
    if slot.bias is not None:
        ids, values = slot.bias
        row[ids] += values


def _bad_tokens(state: RequestState) -> list[int]:
    """Tokens that would complete a bad word."""
    banned = []
    for word in state.bad_words_token_ids:
        head = len(word) - 1
        if head == 0 or tuple(state.output_token_ids[-head:]) == word[:-1]:
            banned.append(word[-1])
    return banned


def _draw_rows(scaled: Tensor, uniform: Tensor) -> Tensor:
    """Draw from softmax(scaled [R, V]): the first id whose running sum passes uniform * total.

    Rows' maxima are 0; the running sum is float64, in order, so each row's is its own.
    """
    return _first_past(scaled.exp().double().cumsum(-1), uniform)


def _first_past(running: Tensor, uniform: Tensor) -> Tensor:
    """The first column at which the running sum [R, N] passes uniform [R] times the total."""
    total = running[:, -1]
    # uniform < 1, but the product may round to the total itself, which nothing passes.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target[:, None], right=True)[:, 0]


def _draw_filtered(
    scaled: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    num_candidates: int = _NUM_CANDIDATES,
) -> Tensor:
    """The same, among the top_k largest (0: all), and of those the top_p nucleus.

    Tokens with equal logits are in or out together, so the answer does not hang on a sort's order.
    Most rows need only their best few candidates; a row that needs more is done again with all.
    """
    vocab_size = scaled.shape[1]
    num = min(num_candidates, vocab_size)
    values, ids = scaled.topk(num, dim=-1)
    weights = values.exp().double()
    limited = ((top_k > 0) & (top_k < vocab_size))[:, None]
    # top-k: what is below the k-th value goes.
    kth = values.gather(-1, (top_k.clamp(1, num) - 1)[:, None])
    weights = torch.where(limited & (values < kth), 0.0, weights)
    # top-p: a token stays while what is more likely sums to less than p of all that is left.
    running = weights.cumsum(-1)
    total = running[:, -1:]
    if num < vocab_size:
        everything = scaled.exp().sum(-1, keepdim=True, dtype=torch.float64)
        total = torch.where(limited, total, everything)
    inside = (running - weights < top_p.clamp(min=1e-12)[:, None] * total) & (weights > 0)
    cutoff = values.gather(-1, inside.sum(-1, keepdim=True) - 1)
    ids, order = ids.sort(-1)
    kept = torch.where(values >= cutoff, weights, 0.0).gather(-1, order)
    out = ids.gather(-1, _first_past(kept.cumsum(-1), uniform)[:, None])[:, 0]
    if num < vocab_size:
        # Not settled: the lowest value kept, or the k-th, may have equals beyond the candidates.
        floor = values[:, -1:]
        unsettled = (cutoff <= floor) | (limited & ((kth <= floor) | (top_k[:, None] > num)))
        again = (unsettled & (floor > -torch.inf))[:, 0].nonzero()[:, 0]
        if len(again):
            out[again] = _draw_filtered(
                scaled[again], top_k[again], top_p[again], uniform[again], vocab_size
            )
    return out
