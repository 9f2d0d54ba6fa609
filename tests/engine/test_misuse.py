"""Interrupts, threads, forks, ends: each is right or refused at once, and nothing poisons the next
call."""

from __future__ import annotations

import asyncio
import dis
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.engine.engine_loop import MAX_FAILED_STEPS
from octavo.errors import EngineDeadError, InvalidParameterError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

CONFIG: dict[str, Any] = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4}
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [1, 2, 3]]
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PACKAGE = str(Path(sys.modules["octavo"].__file__ or "").parent)


def ask(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def assert_empty(llm: LLM) -> None:
    engine = llm._engine
    stats = engine.core.stats()
    assert stats["num_running"] == stats["num_waiting"] == stats["num_in_flight"] == 0
    assert not engine.core.has_work()
    assert engine._requests == {}
    assert not engine._in_flight
    assert engine.core.outbox.drain() == []
    engine.core.check_integrity()


class Interrupter:
    """Raises KeyboardInterrupt at the n-th place in octavo's own code where a signal's handler may
    run: as a function begins, after a call, at a jump back."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.has_fired = False

    def _trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        code = frame.f_code.co_code
        previous = "RESUME"

        def trace(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            nonlocal previous
            if event == "opcode":
                if previous.startswith(("RESUME", "CALL", "JUMP_BACKWARD")):
                    self._left -= 1
                    if self._left == 0:
                        self.has_fired = True
                        raise KeyboardInterrupt
                previous = dis.opname[code[frame.f_lasti]]
            return trace

        return trace

    def __enter__(self) -> Interrupter:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_an_interrupt_anywhere_leaves_an_engine_for_the_next_call(
    fake_model: Any, alone: Any, max_in_flight: int
) -> None:
    fake_model(24, max_in_flight)
    llm = LLM(**CONFIG)
    expected = [alone(prompt, 4) for prompt in PROMPTS]
    for at in itertools.count(1, 3):
        interrupter = Interrupter(at)
        try:
            with interrupter:
                ask(llm)
        except KeyboardInterrupt:
            pass
        assert ask(llm) == expected, f"after an interrupt at place {at}"
        assert_empty(llm)
        if not interrupter.has_fired:
            break
    assert at > 300, "calls were interrupted"


def test_an_interrupt_of_the_cleanup_is_made_up_for(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    runner: Any = llm._engine.runner

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    runner.fail = runner.abandon = interrupt
    with pytest.raises(KeyboardInterrupt):
        ask(llm)
    assert llm._engine.core.stats()["num_in_flight"] == 1, "nothing was cleaned up"
    runner.fail = lambda batch: None
    del runner.abandon
    assert ask(llm) == [alone(prompt, 4) for prompt in PROMPTS]
    assert_empty(llm)


def test_a_request_that_the_core_does_not_take_fails_alone(
    fake_model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the checks had overlooked something.
    monkeypatch.setattr(SamplingParams, "clone", lambda params: params)
    fake_model()
    llm = LLM(**CONFIG)
    bad = SamplingParams(n=2, max_tokens=4)
    bad.stop = ("\ud800",)
    with pytest.raises(RuntimeError, match="failed"):
        llm.generate([*PROMPTS, [1]], [PARAMS, bad, PARAMS, bad], use_tqdm=False)
    assert ask(llm) == [alone(prompt, 4) for prompt in PROMPTS]
    assert_empty(llm)

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**CONFIG))
        await engine.start()

        async def last(params: SamplingParams) -> Any:
            async for output in engine.generate([1, 2], params):
                last = output
            return last

        failed, good = await asyncio.wait_for(asyncio.gather(last(bad), last(PARAMS)), 20)
        assert [sample.finish_reason for sample in failed.outputs] == ["error", "error"]
        assert good.outputs[0].token_ids == alone([1, 2], 4)
        assert engine.num_unfinished == 0
        assert engine.is_healthy
        assert engine.metrics.snapshot()["request_success"]["error"] == 2
        await engine.stop()

    asyncio.run(main())


def test_values_of_other_types_are_refused_before_anything_runs(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    odd: list[Any] = [None, 5, 1.5, [None], [1.5], [[1], 5], [[1, "x"]], [[-1]], [[2**40]], {}]
    for prompts in odd:
        with pytest.raises((ValueError, TypeError)):
            llm.generate(prompts, PARAMS, use_tqdm=False)
    for params in ("x", {"n": 1}, [PARAMS, 5, PARAMS], [PARAMS], 5):
        with pytest.raises((ValueError, TypeError)):
            llm.generate(PROMPTS, params, use_tqdm=False)  # type: ignore[arg-type]
    prepare = llm._engine.prepare
    for priority in ("1", 1.5, 2**63, True):
        with pytest.raises(InvalidParameterError, match="priority"):
            prepare(TokenIds([1]), PARAMS, priority=priority)  # type: ignore[arg-type]
    outside = {
        "logit_bias": {10**6: 1.0, 5: 1.0},
        "stop_token_ids": [10**6],
        "allowed_token_ids": [10**6],
    }
    for param, ids in outside.items():
        with pytest.raises(InvalidParameterError, match=f"{param} must hold.*, not 1000000$"):
            prepare(TokenIds([1]), SamplingParams(**{param: ids}))
    many = {10**6 + n: 1.0 for n in range(20)}
    with pytest.raises(InvalidParameterError, match=r"not 1000000, .*1000007, \.\.\.$"):
        prepare(TokenIds([1]), SamplingParams(logit_bias=many))
    with pytest.raises(InvalidParameterError, match=r"token id 1000000 .* out of vocabulary"):
        prepare(TokenIds([1, 10**6]), PARAMS)
    for salt in (5, b"x", "\ud800"):
        with pytest.raises(InvalidParameterError, match="cache_salt"):
            prepare(TokenIds([1]), PARAMS, cache_salt=salt)  # type: ignore[arg-type]
    assert_empty(llm)


def test_an_llm_serves_threads_one_after_another(fake_model: Any, alone: Any) -> None:
    fake_model(max_in_flight=2)
    llm = LLM(**CONFIG)
    expected = [alone(prompt, 4) for prompt in PROMPTS]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            try:
                if (found := ask(llm)) != expected:
                    wrong.append(found)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert_empty(llm)


def test_a_call_within_a_call_is_refused(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    runner: Any = llm._engine.runner
    runner.fail = lambda batch: ask(llm)
    with pytest.raises(RuntimeError, match="failed"):
        ask(llm)
    found: list[Exception] = []

    def nested(batch: Any) -> None:
        try:
            ask(llm)
        except RuntimeError as error:
            found.append(error)

    runner.fail = nested
    ask(llm)
    assert all("on this thread already" in str(error) for error in found)
    assert found


def test_a_dead_engine_says_so_at_once(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    runner: Any = llm._engine.runner

    def fail(batch: Any) -> None:
        raise ValueError("broken")

    runner.fail = fail
    for _ in range(MAX_FAILED_STEPS - 1):
        with pytest.raises(RuntimeError, match="failed"):
            ask(llm)
    for _ in range(3):
        with pytest.raises(EngineDeadError):
            ask(llm)
    assert runner.num_launches == MAX_FAILED_STEPS


def in_child(work: Callable[[], object]) -> str:
    """What a forked child's call raises, or "" if it returns."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        answer = ""
        try:
            work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writable, answer.encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_is_refused(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    assert in_child(lambda: ask(llm)).startswith("RuntimeError: an LLM does not work in a forked")
    assert ask(llm) == [alone(prompt, 4) for prompt in PROMPTS]

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**CONFIG))
        await engine.start()
        told = in_child(lambda: engine.submit(TokenIds([1]), PARAMS, print))
        assert told.startswith("RuntimeError: this AsyncEngine belongs to the process")
        await engine.stop()

    asyncio.run(main())


def test_an_async_engine_belongs_to_one_loop_and_one_life(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**CONFIG))
        with pytest.raises(RuntimeError, match="has not been started"):
            engine.submit(TokenIds([1]), PARAMS, print)
        await engine.start()
        with pytest.raises(RuntimeError, match="started already"):
            await engine.start()

        async def elsewhere() -> None:
            async for _ in engine.generate([1, 2], PARAMS):
                pass

        with pytest.raises(RuntimeError, match="belongs to the event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        with pytest.raises(RuntimeError):
            await asyncio.to_thread(engine.submit, TokenIds([1]), PARAMS, print)
        assert engine.num_unfinished == 0
        await engine.stop()
        await engine.stop()
        with pytest.raises(EngineDeadError, match="stopped"):
            engine.submit(TokenIds([1]), PARAMS, print)
        with pytest.raises(EngineDeadError, match="stopped"):
            await anext(engine.generate([1, 2], PARAMS))

    asyncio.run(main())


def test_a_stop_ends_every_wait(fake_model: Any) -> None:
    """Also where the engine cannot abort: its thread is gone before it has taken the command."""
    fake_model()

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**{**CONFIG, "max_num_seqs": 1}))
        await engine.start()
        runner: Any = engine._engine_loop.runner
        runner.fail = lambda batch: time.sleep(0.01)
        params = SamplingParams(max_tokens=60, ignore_eos=True)

        async def reasons() -> list[str | None]:
            async for output in engine.generate([1, 2], params):
                last = output
            return [sample.finish_reason for sample in last.outputs]

        tasks = [asyncio.create_task(reasons()) for _ in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.wait_for(engine.stop(), 20)
        assert await asyncio.wait_for(asyncio.gather(*tasks), 20) == [["abort"]] * 3
        assert engine.num_unfinished == 0

        engine = AsyncEngine(EngineConfig(**CONFIG))
        await engine.start()
        engine._engine_loop.stop()
        news: list[Any] = []
        engine._sinks[77] = news.append
        engine._is_stopped = False
        engine.abort = lambda ids: engine._sinks.update({})  # type: ignore[method-assign]
        engine._wait_idle = lambda timeout_s: asyncio.sleep(0)  # type: ignore[method-assign]
        await asyncio.wait_for(engine.stop(), 20)
        assert [type(one) for one in news] == [EngineDeadError]

    asyncio.run(main())
