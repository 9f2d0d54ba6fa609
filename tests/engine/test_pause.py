"""Tests of AsyncEngine's pause: what becomes of the requests that are there, and of new ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine.async_llm_engine import AsyncLLM
from octavo.engine.engine import AsyncEngine
from octavo.errors import EngineDeadError, PausedError
from octavo.sampling_params import SamplingParams

PROMPT = [1, 2, 3]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


@asynccontextmanager
async def running() -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(AsyncEngine(EngineConfig(block_size=4, max_model_len=60_000, max_num_seqs=4)))
    try:
        yield llm
    finally:
        llm.shutdown()


class Reader:
    """A request that is read as it comes."""

    def __init__(self, llm: AsyncLLM, max_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.reason: str | None = None
        self._task = asyncio.create_task(self._read(llm, max_tokens))

    async def _read(self, llm: AsyncLLM, max_tokens: int) -> None:
        async for output in llm.generate(PROMPT, params(max_tokens)):
            self.token_ids = list(output.outputs[0].token_ids)
            self.reason = output.outputs[0].finish_reason

    async def begun(self) -> None:
        while not self.token_ids:
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        await asyncio.wait_for(self._task, 30)


async def settled() -> None:
    """What was under way has been delivered."""
    for _ in range(10):
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_what_is_kept_goes_on_where_it_was(fake_model: Any, alone: Any, max_in_flight: int) -> None:
    fake_model(20_000, max_in_flight=max_in_flight)

    async def main() -> None:
        async with running() as llm:
            reader = Reader(llm, 2000)
            await reader.begun()
            await llm.pause_generation(mode="keep")
            assert await llm.is_paused()
            await settled()
            before = len(reader.token_ids)
            assert before < 2000
            waiting = Reader(llm, 3)
            await asyncio.sleep(0.1)
            assert (len(reader.token_ids), waiting.token_ids) == (before, [])
            await llm.check_health()
            await llm.resume_generation()
            assert not await llm.is_paused()
            await reader.end()
            await waiting.end()
            assert reader.token_ids == alone(PROMPT, 2000)
            assert waiting.token_ids == alone(PROMPT, 3)

    asyncio.run(main())


def test_an_abort_ends_what_runs_and_takes_nothing_new(fake_model: Any, alone: Any) -> None:
    fake_model(20_000)

    async def main() -> None:
        async with running() as llm:
            reader = Reader(llm, 50_000)
            await reader.begun()
            await llm.pause_generation()
            await reader.end()
            assert reader.reason == "abort"
            with pytest.raises(PausedError, match="paused"):
                await Reader(llm, 1).end()
            await llm.resume_generation()
            again = Reader(llm, 5)
            await again.end()
            assert again.token_ids == alone(PROMPT, 5)

    asyncio.run(main())


def test_a_wait_lets_what_runs_end(fake_model: Any, alone: Any) -> None:
    fake_model(20_000)

    async def main() -> None:
        async with running() as llm:
            reader = Reader(llm, 2000)
            await reader.begun()
            pause = asyncio.create_task(llm.pause_generation(mode="wait"))
            await asyncio.sleep(0)
            with pytest.raises(PausedError):
                await Reader(llm, 1).end()
            await asyncio.wait_for(pause, 30)
            await reader.end()
            assert reader.token_ids == alone(PROMPT, 2000)
            await llm.resume_generation()

    asyncio.run(main())


@pytest.mark.parametrize(("clear_cache", "num_cached"), [(True, 0), (False, 8)])
def test_prefixes_are_forgotten_if_asked(
    fake_model: Any, clear_cache: bool, num_cached: int
) -> None:
    fake_model()

    async def main() -> None:
        async with running() as llm:

            async def cached() -> int:
                found = 0
                async for output in llm.generate(list(range(1, 11)), params(1)):
                    found = output.num_cached_tokens
                return found

            await cached()
            await llm.pause_generation(mode="wait", clear_cache=clear_cache)
            await llm.resume_generation()
            assert await cached() == num_cached

    asyncio.run(main())


def test_a_pause_holds_up_no_end(fake_model: Any) -> None:
    """Of a request that is held, nor of the engine."""
    fake_model(20_000)

    async def main() -> None:
        async with running() as llm:
            ended = asyncio.Event()
            await llm.pause_generation(mode="keep")
            [held] = llm.engine.submit(TokenIds(PROMPT), params(1), lambda _: ended.set())
            llm.engine.abort([held])
            await asyncio.wait_for(ended.wait(), 10)
            lost: asyncio.Queue[Any] = asyncio.Queue()
            llm.engine.submit(TokenIds(PROMPT), params(1), lost.put_nowait)
            await asyncio.wait_for(llm.engine.stop(), 10)
            assert (await lost.get()).finish_reason == "abort"

    asyncio.run(main())


def test_a_death_ends_a_pause(fake_model: Any) -> None:
    fake_model()

    async def main() -> None:
        async with running() as llm:
            await llm.pause_generation(mode="keep")
            await llm.resume_generation()

            def fail() -> None:
                raise MemoryError

            llm.engine._engine_loop.call(fail)
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(llm.pause_generation(mode="keep"), 10)
            with pytest.raises(ValueError, match="mode must be one of abort, wait, keep"):
                await llm.pause_generation(mode="stop")  # type: ignore[arg-type]

    asyncio.run(main())
