"""AsyncEngine and LLM over the hash model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.engine.limits import RequestLimits
from octavo.errors import (
    EngineDeadError,
    InvalidParameterError,
    QueueFullError,
    RequestTooLongError,
)
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

CONFIG: dict[str, Any] = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4}


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(**{**CONFIG, **config}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: AsyncEngine, prompt: list[int], **params: Any) -> Any:
    last = None
    async for output in engine.generate(prompt, SamplingParams(ignore_eos=True, **params)):
        last = output
    return last


def test_generate_streams_what_the_model_says(fake_model: Any, alone: Any) -> None:
    fake_model(max_in_flight=2)

    async def main() -> None:
        async with running() as engine:
            prompts = [[i, i + 1, i + 2] for i in range(10)]
            outputs = await asyncio.gather(
                *(collect(engine, prompt, max_tokens=12) for prompt in prompts)
            )
            for prompt, output in zip(prompts, outputs, strict=True):
                assert output.finished
                assert output.outputs[0].token_ids == alone(prompt, 12)
                assert output.outputs[0].finish_reason == "length"
            assert engine.num_unfinished == 0

    asyncio.run(main())


def test_n_samples_share_one_prompt(fake_model: Any, alone: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running() as engine:
            output = await collect(engine, [1, 2, 3, 4, 5], n=3, max_tokens=6)
            assert [o.index for o in output.outputs] == [0, 1, 2]
            for sample in output.outputs:
                assert sample.token_ids == alone([1, 2, 3, 4, 5], 6)

    asyncio.run(main())


def test_leaving_the_iteration_frees_the_blocks(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running(max_model_len=64) as engine:
            params = SamplingParams(max_tokens=50, ignore_eos=True)
            stream = engine.generate([1, 2, 3], params)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            for _ in range(500):
                if engine.num_unfinished == 0:
                    break
                await asyncio.sleep(0.01)
            assert engine.num_unfinished == 0
            assert engine.metrics.snapshot()["num_requests_running"] == 0
            assert engine.metrics.snapshot()["kv_cache_usage_perc"] == 0

    asyncio.run(main())


def test_requests_that_can_never_run_are_refused(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running() as engine:
            with pytest.raises(RequestTooLongError):
                await collect(engine, [1] * 64, max_tokens=1)
            with pytest.raises(InvalidParameterError, match="prompt"):
                await collect(engine, [1000], max_tokens=1)
            with pytest.raises(InvalidParameterError, match="prompt"):
                await collect(engine, [], max_tokens=1)
            with pytest.raises(InvalidParameterError, match="logprobs"):
                await collect(engine, [1], max_tokens=1, logprobs=21)
            assert engine.num_unfinished == 0
            assert (await collect(engine, [1] * 63, max_tokens=5)).outputs[0].token_ids

    asyncio.run(main())


def test_spaces_between_special_tokens() -> None:
    """Refused where the tokenizer would write some: it has no way not to."""
    bare = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    skipped = SamplingParams(spaces_between_special_tokens=False)
    for spaces_tokens in (False, True):
        tokenizer: Any = SimpleNamespace(spaces_tokens=spaces_tokens)
        limits = RequestLimits(100, 10, 20, tokenizer)
        assert limits.check(TokenIds([1]), skipped) == 16
        if spaces_tokens:
            with pytest.raises(InvalidParameterError, match="spaces_between_special_tokens"):
                limits.check(TokenIds([1]), bare)
        else:
            assert limits.check(TokenIds([1]), bare) == 16


def test_the_queue_is_bounded(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running(max_num_seqs=1, max_num_queued_reqs=3) as engine:
            params = SamplingParams(max_tokens=40, ignore_eos=True)
            for _ in range(3):
                engine.submit(TokenIds([1, 2]), params, lambda delta: None)
            with pytest.raises(QueueFullError, match="3 requests are running or waiting"):
                engine.submit(TokenIds([1, 2]), params, lambda delta: None)


def test_one_request_always_fits(fake_model: Any) -> None:
    """Of many samples, or a long prompt: it could never be tried again otherwise."""
    fake_model()

    async def main() -> None:
        limits = {"max_num_queued_reqs": 1, "max_num_queued_tokens": 1}
        async with running(max_num_seqs=4, **limits) as engine:
            params = SamplingParams(max_tokens=4, n=3)
            ended = asyncio.Queue[Any]()
            engine.submit(TokenIds([1, 2]), params, ended.put_nowait)
            for _ in range(3):
                await asyncio.wait_for(ended.get(), 10)

    asyncio.run(main())


def test_prompt_tokens_that_wait_are_bounded(fake_model: Any) -> None:
    """A request counts until its first token is there, or it is over."""
    fake_model(20_000)

    async def main() -> None:
        # So long that none is over before the loop of a busy machine looks.
        limits = {"max_num_seqs": 1, "max_num_queued_tokens": 10, "max_model_len": 60_000}
        async with running(**limits) as engine:
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            ids = []
            for _ in range(2):
                ids += engine.submit(TokenIds([1, 2, 3, 4, 5]), params, lambda delta: None)
            with pytest.raises(QueueFullError, match="10 tokens of prompts"):
                engine.submit(TokenIds([1]), params, lambda delta: None)
            while engine.num_unfinished:
                await asyncio.sleep(0.001)
            # One that runs has its first token, and is no longer in the way.
            long = SamplingParams(max_tokens=50_000, ignore_eos=True)
            begun = asyncio.Event()
            engine.submit(TokenIds(range(1, 21)), long, lambda _: begun.set(), delivery="delta")
            await asyncio.wait_for(begun.wait(), 10)
            over = asyncio.Event()
            [waiting] = engine.submit(TokenIds([1] * 12), long, lambda _: over.set())
            with pytest.raises(QueueFullError, match="12 tokens of prompts"):
                engine.submit(TokenIds([1]), long, lambda delta: None)
            engine.abort([waiting])
            await asyncio.wait_for(over.wait(), 10)
            engine.submit(TokenIds([1]), long, lambda delta: None)

    asyncio.run(main())


def block_until_settled(engine: AsyncEngine, num_ended: int) -> None:
    """Keep the event loop until the core is done with so many requests of two tokens."""
    late = time.monotonic() + 10
    while engine.metrics.settled() != (num_ended, 2 * num_ended):
        assert time.monotonic() < late
        time.sleep(0.001)


@pytest.mark.parametrize("limit", ["max_num_queued_reqs", "max_num_queued_tokens"])
def test_what_is_over_waits_for_nobody_to_read_it(fake_model: Any, limit: str) -> None:
    """A busy event loop reads late; the place in the queue is free as soon as the core is done."""
    fake_model()

    async def main() -> None:
        async with running(max_num_seqs=1, **{limit: 2}) as engine:
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            for num_ended in range(1, 20):
                engine.submit(TokenIds([1, 2]), params, lambda delta: None)
                block_until_settled(engine, num_ended)
            # Nothing has been read yet: the loop was here all the time.
            assert engine.num_unfinished == 19

    asyncio.run(main())


def test_death_reaches_every_waiter(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running(max_num_seqs=1) as engine:

            def fail(batch: Any) -> None:
                raise RuntimeError("broken")

            engine._engine_loop.runner.fail = fail
            results = await asyncio.gather(
                *(collect(engine, [1, 2], max_tokens=4) for _ in range(8)), return_exceptions=True
            )
            assert any(isinstance(result, EngineDeadError) for result in results)
            await asyncio.wait_for(engine.wait_dead(), 10)
            assert not engine.is_healthy
            with pytest.raises(EngineDeadError):
                engine.submit(TokenIds([1]), SamplingParams(), lambda delta: None)

    asyncio.run(main())


def test_llm_generates_in_order(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    prompts = [[i, 3, 5] for i in range(9)]
    params = SamplingParams(max_tokens=7, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [alone(p, 7) for p in prompts]
    single = llm.generate([4, 5, 6], params, use_tqdm=False)
    assert single[0].outputs[0].token_ids == alone([4, 5, 6], 7)


def test_llm_refuses_all_or_nothing(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    with pytest.raises(RequestTooLongError):
        llm.generate([[1, 2], [1] * 64], use_tqdm=False)
    assert not llm._engine.core.has_work()
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    assert llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].token_ids == alone(
        [1, 2], 3
    )
