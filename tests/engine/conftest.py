"""An engine whose model is a hash: real core, real loop, no torch arithmetic.

FakeRunner keeps a "KV cache" of token ids. Its next token is a hash of the whole context it reads
back through the block table, so a wrong slot, position, block or order changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from octavo._core import Staging
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.runner.sampler import SampledTokens

VOCAB_SIZE = 1000
MASK_WORDS = 4096  # of any vocabulary
EOS = 7


def next_token(context: list[int]) -> int:
    return zlib.crc32(np.asarray(context, np.int32).tobytes()) % VOCAB_SIZE


@dataclass
class FakeModelConfig:
    vocab_size: int = VOCAB_SIZE


@dataclass
class FakeSource:
    name: str = "fake"
    model_config: FakeModelConfig = field(default_factory=FakeModelConfig)
    chat_template: str | None = None
    tool_template: str | None = None
    response_template: Any = None
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = (EOS,)


class FakeRunner:
    """The runner's interface over a hash."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_in_flight: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = config.block_size
        self.max_model_len = config.max_model_len or 256
        self.max_num_seqs = config.max_num_seqs or 8
        self.max_num_batched_tokens = config.max_num_batched_tokens or 64
        self.max_in_flight = max_in_flight
        self.num_stages = max(max_in_flight - 1, 1)
        self.keeps_kv = True
        self.num_state_checkpoints = None
        self.padded_prompts = ()
        self.prefix_sharing = None
        self.pooling = None
        self.max_blocks = -(-self.max_model_len // self.block_size)
        size = Staging.required_len(
            self.max_num_batched_tokens, self.max_num_seqs, self.max_model_len, self.block_size
        )
        self.buffers = [np.zeros(size, np.int32) for _ in range(max_in_flight)]
        self.stagings = [Staging(buffer) for buffer in self.buffers]
        self.turn = 0
        self.kv = np.full(num_blocks * self.block_size, -1, np.int64)
        self.block_table = np.full(self.max_num_seqs * self.max_blocks, -1, np.int64)
        self.last_token = np.full(self.max_num_seqs + 1, -1, np.int64)
        self.fail: Callable[[Any], None] = lambda batch: None
        self.num_launches = 0
        self.num_abandoned = 0
        self.num_uncaptured = 0
        self.on_capture: Callable[[], None] = lambda: None

    def warm_up(self) -> None:
        pass

    def idle_work(self) -> bool:
        if not self.num_uncaptured:
            return False
        self.num_uncaptured -= 1
        self.on_capture()
        return True

    def enter_thread(self) -> None:
        pass

    def memory(self) -> list[tuple[str, str]]:
        return []

    def is_fatal(self, error: BaseException) -> bool:
        return False

    def observe(self, observer: Any) -> None:
        pass

    def next_staging(self) -> Staging:
        self.turn = (self.turn + 1) % len(self.stagings)
        return self.stagings[self.turn]

    def launch(self, batch: Any, staging: Staging, requests: Any) -> SampledTokens:
        self.num_launches += 1
        self.fail(batch)
        buffer = self.buffers[self.stagings.index(staging)]

        def section(offset: int, length: int) -> Any:
            return buffer[offset : offset + length]

        updates = section(batch.block_updates_offset, 2 * batch.num_block_updates)
        self.block_table[updates[: batch.num_block_updates]] = updates[batch.num_block_updates :]
        slots = section(batch.slots_offset, batch.num_reqs)
        starts = section(batch.query_start_loc_offset, batch.num_reqs + 1)
        seq_lens = section(batch.seq_lens_offset, batch.num_reqs)
        ids = section(batch.input_ids_offset, batch.num_tokens)
        slot_mapping = section(batch.slot_mapping_offset, batch.num_tokens)
        for slot, request_id, num_outputs in batch.new_slots:
            assert request_id in requests
            assert num_outputs >= 0
            assert slot in slots
        for r in range(batch.num_reqs):
            for t in range(starts[r], starts[r + 1]):
                token = ids[t] if ids[t] >= 0 else self.last_token[slots[r]]
                self.kv[slot_mapping[t]] = token
        rows = section(batch.sample_rows_offset, batch.num_samples)
        tokens = []
        for row in rows:
            r = int(np.searchsorted(starts, row, side="right")) - 1
            positions = np.arange(seq_lens[r])
            table = self.block_table.reshape(-1, self.max_blocks)[slots[r]]
            where = table[positions // self.block_size] * self.block_size
            context = self.kv[where + positions % self.block_size]
            tokens.append(next_token(context.tolist()))
            self.last_token[slots[r]] = tokens[-1]
        return SampledTokens(np.asarray(tokens, np.int32))

    def choose(self, in_flight: SampledTokens, fill: Callable[[Any, Any], int]) -> None:
        """The hash knows no masks: they have to allow what it says."""
        rows = np.empty(self.max_num_seqs, np.int32)
        masks = np.empty((self.max_num_seqs, MASK_WORDS), np.uint32)
        for row, mask in zip(rows[: fill(rows, masks)], masks, strict=False):
            token = int(in_flight.token_ids[row])
            assert row < 0 or mask[token // 32] >> (token % 32) & 1, f"token {token} is masked"

    def collect(self, in_flight: SampledTokens) -> SampledTokens:
        return in_flight

    def abandon(self) -> None:
        self.num_abandoned += 1


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes every EngineLoop load the hash model. Call it with (num_blocks, max_in_flight)."""

    def install(num_blocks: int = 64, max_in_flight: int = 1) -> None:
        monkeypatch.setattr(engine_loop, "resolve_model", lambda config: FakeSource())
        monkeypatch.setattr(engine_loop, "load_tokenizer", lambda source, config: None)
        monkeypatch.setattr(
            engine_loop,
            "make_runner",
            lambda config, source: FakeRunner(config, num_blocks, max_in_flight),
        )

    return install


def expected_tokens(prompt: list[int], max_tokens: int, ignore_eos: bool = True) -> list[int]:
    """What the hash model says to a prompt that runs alone."""
    context = list(prompt)
    while len(context) < len(prompt) + max_tokens:
        context.append(next_token(context))
        if context[-1] == EOS and not ignore_eos:
            break
    return context[len(prompt) :]


@pytest.fixture
def alone() -> Callable[..., list[int]]:
    return expected_tokens
