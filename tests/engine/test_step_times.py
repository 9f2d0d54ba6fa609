"""Prompts beside requests that decode: by time, over the real core and loop."""

from __future__ import annotations

import time
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine.engine_loop import EngineLoop
from octavo.sampling_params import SamplingParams

LONG = [(7 * i) % 900 for i in range(8000)]
# A step's tokens take so long, or a step of decodes would be nothing but this machine's noise.
TOKEN_S = 50e-6


def tokens_beside(loop: EngineLoop) -> tuple[int, dict[int, list[int]]]:
    """Tokens that a request gets from a long prompt's coming to that one's first token; and all."""

    def submit(prompt: list[int], max_tokens: int) -> int:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        samples = loop.prepare(TokenIds(prompt), params, delivery="delta")
        loop.submit(samples)
        return samples[0].request_id

    found: dict[int, list[int]] = {}
    decoding = submit([1, 2, 3], 300)
    long = -1
    beside = 0
    while loop.step() or loop.core.has_work():
        loop.core.check_integrity()
        for delta in loop.core.outbox.drain():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.request_id == decoding and long not in found:
                beside += len(delta.token_ids)
        if long < 0 and len(found.get(decoding, [])) >= 8:
            beside = 0
            long = submit(LONG, 3)
    return beside, found


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_long_prompt_hardly_delays_the_others(
    fake_model: Any, alone: Any, max_in_flight: int
) -> None:
    beside = {}
    # So short that a step's prompts get the least there is, whatever this machine is at.
    for max_step_ms in (0.0, 1e-6):
        fake_model(4096, max_in_flight)
        loop = EngineLoop(
            EngineConfig(
                block_size=4,
                max_model_len=8192,
                max_num_seqs=2,
                max_num_batched_tokens=8192,
                max_step_ms=max_step_ms,
            )
        )
        loop.runner.fail = lambda batch: time.sleep(TOKEN_S * batch.num_tokens)
        beside[max_step_ms], found = tokens_beside(loop)
        assert found[0] == alone([1, 2, 3], 300, True)
        assert found[1] == alone(LONG, 3, True)
    assert beside[0.0] <= 2 * max_in_flight
    # 64 tokens of the prompt a step, or some more.
    assert beside[1e-6] > 30 // max(max_in_flight - 1, 1)
