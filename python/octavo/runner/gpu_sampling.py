"""GpuSampling: each slot's way of choosing tokens, in tensors that captured graphs read.

The parameters of a request are written once, when it gets its slot: its record travels in the
step's own copy (``admit`` returns it), biases, masks and counts by copies of their own. Logits are
changed by bias, allowed ids and penalties only in steps where some request asks for that
(``adjusts``): those have graphs of their own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.gpu.adjust_logits import IN_PROMPT, MAX_COUNT
from octavo.kernels.gpu.ops import SamplingState
from octavo.runner.logprobs import (
    RAW_LOGPROBS,
    LogprobsMode,
    NamedTokens,
    TokenLogprobs,
    copy_logprobs,
    processed_logits,
)
from octavo.runner.request_state import RequestState
from octavo.runner.slots import SlotRecords

FOREVER = 2**31 - 1
# Biased tokens a request may have before the tables grow.
BIAS_WIDTH = 64


class Needs(NamedTuple):
    """The demands of a step's samples together, beyond their slots' records.

    ``num_logprobs``: -1 is none; ``keep_raw``: of logits as they were before they were adjusted;
    ``tracked``: rows whose ids the host must know, and the lists they are appended to;
    ``normalizes``: log probabilities, not logits; ``records``: of the rows, where the logits are to
    be processed as drawing does; ``named``: rows that report tokens which their request names.
    """

    adjusted: bool
    num_logprobs: int
    keep_raw: bool
    tracked: Sequence[tuple[int, list[int]]]
    normalizes: bool = True
    records: NDArray[np.int32] | None = None
    named: Sequence[NamedTokens] = ()

    def copy_logprobs(self, logits: Tensor, ids: Tensor) -> TokenLogprobs:
        """The log probabilities, or logits, of a step's samples; logits [S, V], ids [S]."""
        if self.records is not None:
            logits = processed_logits(logits, self.records, ids)
        return copy_logprobs(
            logits, ids, self.num_logprobs, normalizes=self.normalizes, named=self.named
        )


PLAIN = Needs(False, -1, False, ())


class GpuSampling:
    """Sampling state by slot; the last slot is the padding's. ``seed``: of requests without one."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        seed: int,
        device: torch.device,
        mode: LogprobsMode = RAW_LOGPROBS,
    ) -> None:
        n = max_num_seqs + 1
        self._mode = mode
        self._random = random.Random(seed)
        self._device = device
        self._records = SlotRecords(n)
        self._states: dict[int, RequestState] = {}
        self._num_logprobs = np.full(n, -1, np.int64)
        self._names_tokens = np.zeros(n, bool)
        self._adjusts = np.zeros(n, bool)
        self._tracks = np.zeros(n, bool)
        # Slots whose request, or last request, asks for more than its record holds: most steps have
        # none, and then no slot is examined.
        self.demanding: set[int] = set()
        # Slots whose bias or mask is not neutral.
        self._marked: set[int] = set()

        def full(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((n, *shape), value, dtype=dtype, device=device)

        self.slot_table = torch.tensor(self._records.rows, device=device)
        self.plain = SamplingState(self.slot_table)
        self._token_counts = full(0, torch.int16, vocab_size)
        self._allowed = full(-1, torch.int32, -(-vocab_size // 32))
        self.adjusted = self._with_bias(BIAS_WIDTH)

    def _with_bias(self, width: int) -> SamplingState:
        shape = (len(self._adjusts), width)
        return SamplingState(
            self.slot_table,
            token_counts=self._token_counts,
            allowed_mask=self._allowed,
            bias_ids=torch.full(shape, -1, dtype=torch.int32, device=self._device),
            bias_values=torch.zeros(shape, dtype=torch.float32, device=self._device),
            bias_until=torch.zeros(shape, dtype=torch.int32, device=self._device),
        )

    # ------------------------------------------------------------------------------ admission

    def admit(self, slot: int, state: RequestState, num_outputs: int) -> NDArray[np.int32]:
        """Give a request this slot: for the first time, after a preemption, or with fewer tokens.

        ``num_outputs``: those of its output; what steps in flight sample in its name besides is
        given up.

        Returns:
            its record [RECORD_LEN], a view that the slot's next request overwrites.
        """
        if state.seed is None:
            state.seed = self._random.getrandbits(64)
        params = state.params
        bias = {int(t): (float(b), FOREVER) for t, b in params.logit_bias.items()}
        if params.min_tokens:
            # A stop token that is also biased stays banned, not only until min_tokens: the kernel
            # has one value for a token.
            for token in {*state.eos_token_ids, *params.stop_token_ids}:
                until = FOREVER if token in bias else params.min_tokens
                bias[token] = (-np.inf, until)
        bias |= dict.fromkeys(state.banned_token_ids, (-np.inf, FOREVER))
        self._states[slot] = state
        num_logprobs = params.num_logprobs
        self._num_logprobs[slot] = -1 if num_logprobs is None else num_logprobs
        self._names_tokens[slot] = bool(params.logprob_token_ids)
        self._adjusts[slot] = bool(bias or params.allowed_token_ids or state.has_penalties)
        self._tracks[slot] = state.has_penalties
        if self._adjusts[slot] or self._tracks[slot] or num_logprobs is not None:
            self.demanding.add(slot)
        else:
            self.demanding.discard(slot)
        if slot in self._marked:
            self._write_bias(slot, {})
            self._allowed[slot].fill_(-1)
            self._marked.discard(slot)
        # Marked before it is written: an interrupt between the two leaves nothing to the next.
        if bias or params.allowed_token_ids:
            self._marked.add(slot)
        if bias:
            self._write_bias(slot, bias)
        if params.allowed_token_ids:
            self._write_allowed(slot, params.allowed_token_ids)
        if state.has_penalties:
            # A list of its own: a step in flight appends what is given up to the one before.
            state.output_token_ids = state.output_token_ids[:num_outputs]
            self._write_counts(slot, state)
        return self._records.write(slot, state)

    def _write_bias(self, slot: int, bias: dict[int, tuple[float, int]]) -> None:
        state = self.adjusted
        width = self._bias_tensors(state)[0].shape[1]
        if len(bias) > width:
            grown = self._with_bias(1 << (len(bias) - 1).bit_length())
            for old, new in zip(self._bias_tensors(state), self._bias_tensors(grown), strict=True):
                new[:, :width].copy_(old)
            self.adjusted = state = grown
        columns = (
            np.array([*bias], np.int32),
            np.array([value for value, _ in bias.values()], np.float32),
            np.array([until for _, until in bias.values()], np.int32),
        )
        for tensor, column in zip(self._bias_tensors(state), columns, strict=True):
            # Where no token is named nothing is added.
            row = torch.full(tensor.shape[1:], -1, dtype=tensor.dtype)
            row[: len(column)] = torch.from_numpy(column)
            tensor[slot].copy_(row)

    @staticmethod
    def _bias_tensors(state: SamplingState) -> tuple[Tensor, Tensor, Tensor]:
        assert state.bias_ids is not None
        assert state.bias_values is not None
        assert state.bias_until is not None
        return state.bias_ids, state.bias_values, state.bias_until

    def _write_allowed(self, slot: int, token_ids: Iterable[int]) -> None:
        words = np.zeros(self._allowed.shape[1] * 4, np.uint8)
        ids = np.fromiter(token_ids, np.int64)
        np.bitwise_or.at(words, ids // 8, (1 << (ids % 8)).astype(np.uint8))
        if sys.byteorder == "big":
            words = words.view(np.uint32).byteswap().view(np.uint8)
        self._allowed[slot].copy_(torch.from_numpy(words.view(np.int32)))

    def _write_counts(self, slot: int, state: RequestState) -> None:
        ids, counts = np.unique(np.asarray(state.output_token_ids, np.int64), return_counts=True)
        row = dict(zip(ids.tolist(), np.minimum(counts, MAX_COUNT).tolist(), strict=True))
        # Only a repetition penalty counts the prompt's tokens.
        if state.params.repetition_penalty != 1.0:
            for token in np.unique(np.asarray(state.prompt_token_ids, np.int64)).tolist():
                row[token] = row.get(token, 0) | IN_PROMPT
        self._token_counts[slot].zero_()
        if row:
            at = torch.tensor(list(row), dtype=torch.int64, device=self._device)
            values = torch.tensor(list(row.values()), dtype=torch.int16, device=self._device)
            self._token_counts[slot].index_copy_(0, at, values)

    # ---------------------------------------------------------------------------------- steps

    def needs(self, slots: NDArray[np.int32]) -> Needs:
        """The demands of a step that samples in these slots [S]."""
        adjusted = bool(self._adjusts[slots].any())
        num_logprobs = int(self._num_logprobs[slots].max(initial=-1))
        rows = np.flatnonzero(self._tracks[slots]).tolist()
        tracked = [(row, self._states[int(slots[row])].output_token_ids) for row in rows]
        if num_logprobs < 0:
            return Needs(adjusted, num_logprobs, False, tracked)
        is_raw = not self._mode.is_processed
        records = None if is_raw else self._records.rows[slots]
        named = [
            NamedTokens(row, self._states[int(slots[row])].params.logprob_token_ids)
            for row in np.flatnonzero(self._names_tokens[slots]).tolist()
        ]
        keep_raw = adjusted and is_raw
        return Needs(
            adjusted, num_logprobs, keep_raw, tracked, self._mode.normalizes, records, named
        )
