"""The loop over the real core: order, run-ahead, failures, aborts, idleness."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.engine.engine_loop import MAX_FAILED_STEPS, EngineLoop
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams


def submit(loop: EngineLoop, prompt: list[int], **params: Any) -> list[int]:
    """Queue a request; the ids of its samples, which count from 0."""
    samples = loop.prepare(TokenIds(prompt), SamplingParams(**params))
    loop.submit(samples)
    return [sample.request_id for sample in samples]


def run_to_end(loop: EngineLoop, max_steps: int = 5000) -> dict[int, Any]:
    """Steps until idle, checking the core's invariants after each; final deltas by id."""
    finals = {}
    for _ in range(max_steps):
        busy = loop.step()
        loop.core.check_integrity()
        finals.update({delta.request_id: delta for delta in loop.core.outbox.drain()})
        if not busy and not loop.core.has_work():
            assert loop._requests == {}, "what is over is forgotten"
            return finals
    raise AssertionError("the engine did not become idle")


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [12, 64])
def test_mixed_requests_say_what_each_says_alone(
    fake_model: Any, alone: Any, max_in_flight: int, num_blocks: int
) -> None:
    fake_model(num_blocks, max_in_flight)
    loop = EngineLoop(
        EngineConfig(block_size=4, max_model_len=40, max_num_seqs=4, max_num_batched_tokens=16)
    )
    rng = random.Random(5)
    shared = [rng.randrange(1000) for _ in range(9)]
    expected = {}
    for request_id in range(30):
        tail = [rng.randrange(1000) for _ in range(rng.randrange(1, 12))]
        prompt = (shared if request_id % 3 == 0 else []) + tail
        max_tokens = rng.randrange(1, 18)
        ignore_eos = request_id % 2 == 0
        assert submit(loop, prompt, max_tokens=max_tokens, ignore_eos=ignore_eos) == [request_id]
        expected[request_id] = alone(prompt, max_tokens, ignore_eos)
    finals = run_to_end(loop)
    assert {i: final.token_ids for i, final in finals.items()} == expected
    stats = loop.core.stats()
    assert stats["num_free_blocks"] + stats["num_cached_blocks"] >= num_blocks
    assert stats["num_running"] == stats["num_waiting"] == stats["num_in_flight"] == 0


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_abort_at_every_step(fake_model: Any, alone: Any, max_in_flight: int) -> None:
    """Whatever is in flight, an abort ends one request and leaves its neighbour's tokens alone."""
    for step in range(12):
        fake_model(16, max_in_flight)
        loop = EngineLoop(
            EngineConfig(block_size=2, max_model_len=32, max_num_seqs=2, max_num_batched_tokens=4)
        )
        submit(loop, [1, 2, 3, 4, 5], max_tokens=20, ignore_eos=True)
        submit(loop, [9, 8, 7], max_tokens=10, ignore_eos=True)
        for _ in range(step):
            loop.step()
        loop.abort([0])
        finals = run_to_end(loop)
        assert finals[0].finish_reason == "abort"
        assert finals[1].finish_reason == "length"
        assert finals[1].token_ids == alone([9, 8, 7], 10)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_an_abort_frees_its_blocks_within_one_step(fake_model: Any, max_in_flight: int) -> None:
    for num_steps in range(1, 8):
        fake_model(32, max_in_flight)
        # The prompt alone takes three steps.
        loop = EngineLoop(
            EngineConfig(block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=8)
        )
        submit(loop, list(range(20)), n=3, max_tokens=30, ignore_eos=True)
        for _ in range(num_steps):
            loop.step()
        assert loop.core.stats()["num_free_blocks"] < 32
        loop.abort(range(3))
        loop.step()
        stats = loop.core.stats()
        assert stats["num_free_blocks"] == 32
        assert stats["num_running"] == stats["num_waiting"] == stats["num_in_flight"] == 0
        loop.core.check_integrity()


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_failed_step_fails_its_requests_only(
    fake_model: Any, alone: Any, max_in_flight: int
) -> None:
    fake_model(32, max_in_flight)
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))

    def fail(batch: Any) -> None:
        if 0 in batch.request_ids:
            raise ValueError("this request's fault")

    loop.runner.fail = fail
    submit(loop, [1, 2], max_tokens=4, ignore_eos=True)
    submit(loop, [3, 4], max_tokens=4, ignore_eos=True)
    finals = run_to_end(loop)
    assert finals[0].finish_reason == "error"
    assert finals[1].finish_reason == "length"
    assert finals[1].token_ids == alone([3, 4], 4)


def test_failing_again_and_again_is_fatal(fake_model: Any) -> None:
    fake_model()
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))

    def fail(batch: Any) -> None:
        raise RuntimeError("broken")

    loop.runner.fail = fail
    for _ in range(MAX_FAILED_STEPS):
        submit(loop, [1, 2], max_tokens=4)
    with pytest.raises(EngineDeadError):
        run_to_end(loop)


def test_an_idle_engine_does_not_step(fake_model: Any) -> None:
    fake_model()
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))
    steps = 0
    real_step = loop.step

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return real_step()

    loop.step = counted
    loop.start()
    try:
        submit(loop, [1, 2], max_tokens=4, ignore_eos=True)
        deadline = time.monotonic() + 10
        while loop.core.metrics.snapshot()["generation_tokens"] < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        before = steps
        time.sleep(0.3)
        assert steps == before
    finally:
        loop.stop()


def test_a_stop_that_a_step_takes_ends_the_thread(fake_model: Any) -> None:
    fake_model()
    loop = EngineLoop(EngineConfig(max_model_len=64))
    # The first step takes it, and the command by which it would wake a thread at rest.
    loop._commands.put(loop.stop)
    loop.start()
    assert loop._thread is not None
    loop._thread.join(10)
    assert not loop._thread.is_alive()
    assert loop.fatal_error is None


def test_pauses_are_used_but_nobody_waits_for_what_is_left(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "QUIET_S", 0.2)
    fake_model()
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))
    runner = loop.runner
    runner.num_uncaptured = 5
    served_at: list[int] = []
    captured_s: list[float] = []

    def come_in_between() -> None:
        captured_s.append(time.monotonic())
        if runner.num_uncaptured == 3:
            submit(loop, [1, 2], max_tokens=4, ignore_eos=True)

    runner.on_capture = come_in_between
    runner.fail = lambda batch: served_at.append(runner.num_uncaptured)
    started_s = time.monotonic()
    loop.start()
    try:
        deadline = started_s + 10
        while runner.num_uncaptured or len(served_at) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        loop.stop()
    assert served_at == [3, 3, 3, 3]
    assert captured_s[0] - started_s >= 0.2, "it was quiet first"
    assert captured_s[2] - captured_s[1] >= 0.2, "and again after the request"


def test_a_failure_in_a_pause_fails_nobody(fake_model: Any) -> None:
    fake_model()
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))
    runner = loop.runner
    runner.num_uncaptured = 1

    def break_down() -> None:
        raise RuntimeError("broken")

    runner.on_capture = break_down
    loop.start()
    try:
        deadline = time.monotonic() + 10
        while runner.num_uncaptured:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        submit(loop, [1, 2], max_tokens=4, ignore_eos=True)
        while loop.core.metrics.snapshot()["generation_tokens"] < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert loop.is_healthy()
    finally:
        loop.stop()


def test_health_is_progress_while_there_is_work(
    fake_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "STALL_S", 0.5)
    fake_model()
    loop = EngineLoop(EngineConfig(block_size=4, max_model_len=32, max_num_seqs=1))
    is_stuck, may_go = threading.Event(), threading.Event()

    def stick(batch: Any) -> None:
        is_stuck.set()
        may_go.wait(60)

    loop.runner.fail = stick
    loop.start()
    try:
        time.sleep(1.0)
        assert loop.is_healthy(), "idle for longer than a step may take"
        submit(loop, [1, 2], max_tokens=4, ignore_eos=True)
        assert is_stuck.wait(10)
        assert loop.is_healthy(), "the step has only begun, whatever came before it"
        time.sleep(1.0)
        assert not loop.is_healthy()
        may_go.set()
        deadline = time.monotonic() + 10
        while not loop.is_healthy():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        may_go.set()
        loop.stop()
