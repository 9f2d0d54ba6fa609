"""AsyncEngine: the event loop's side of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, get_args

from octavo.engine.engine_loop import STALL_S, EngineLoop
from octavo.engine.limits import truncate
from octavo.engine.model_facts import ModelFacts
from octavo.engine.prompts import Prompt, checked_ids, prompt_parts, prompt_salt, tokenization
from octavo.errors import EngineDeadError, PausedError, QueueFullError
from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from octavo._core import (
        Channels,
        Delta,
        Grammar,
        Metrics,
        SseTemplate,
        SseWriter,
        TokenIds,
        Tokenizer,
    )
    from octavo.config import EngineConfig
    from octavo.engine.step_times import StepTimes
    from octavo.models.config import ModelConfig
    from octavo.models.source import ModelSource
    from octavo.pooling import PoolingInfo
    from octavo.runner.request_state import Delivery
    from octavo.sampling_params import SamplingParams
    from octavo.structured_outputs import ReasoningTokens

logger = logging.getLogger("octavo.engine")

# Receives a sample's output, or the reason why no more will come.
Sink = Callable[["Delta | EngineDeadError"], None]
# What a pause does with the requests that are there.
PauseMode = Literal["abort", "wait", "keep"]

# Below this an encode costs less than a hop to a worker thread and back.
INLINE_ENCODE_CHARS = 2048

# Threads that wait for grammars to be compiled. Not those that encode: a hostile grammar takes its
# time, and the next long prompt must not.
NUM_COMPILE_THREADS = 4
# Beside those that run, unless the configuration has its own limit.
_MAX_WAITING = 4096


class AsyncEngine:
    """Loads a model and serves requests from the event loop that called ``start``.

    Construction blocks (it reads the weights); ``start`` and everything after it belongs to one
    event loop, and other threads and forked processes are refused. One engine thread steps; one
    wake-up of the loop per step delivers.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._engine_loop = EngineLoop(config, self._wake_up)
        source = self._engine_loop.source
        self.source: ModelSource = source
        self.model_config: ModelConfig = source.model_config
        self.model_facts = ModelFacts(self._engine_loop)
        self.tokenizer: Tokenizer = self._engine_loop.tokenizer
        self.chat_template: str | None = source.chat_template
        self.tool_template: str | None = source.tool_template
        self.response_template: Any = source.response_template
        self.generation_defaults: dict[str, Any] = source.generation_defaults
        self.special_tokens: dict[str, str] = source.special_tokens
        self.eos_token_ids: tuple[int, ...] = source.eos_token_ids
        self.max_model_len: int = self._engine_loop.limits.max_model_len
        # None where the model generates text.
        self.pooling: PoolingInfo | None = self._engine_loop.runner.pooling
        # Of all requests at once: what the cache of keys and values holds.
        self.num_kv_tokens: int = (
            self._engine_loop.runner.num_blocks * self._engine_loop.runner.block_size
        )
        # Tokens of a prompt are kept for later ones by so many; None: none are kept.
        self.prefix_block_size: int | None = (
            self._engine_loop.runner.block_size if self._engine_loop.keeps_prefixes else None
        )
        self.served_model_names: tuple[str, ...] = config.served_model_name or (source.name,)
        self.metrics: Metrics = self._engine_loop.core.metrics
        self.step_times: StepTimes = self._engine_loop.step_times
        self.memory_table: list[tuple[str, str]] = self._engine_loop.runner.memory()
        self.created_s = int(time.time())
        # Sample id -> the receiver of its deltas.
        self._sinks: dict[int, Sink] = {}
        max_num_seqs = self._engine_loop.runner.max_num_seqs
        self.max_unfinished = self.config.max_num_queued_reqs or max_num_seqs + _MAX_WAITING
        # Of all samples that were ever queued.
        self._num_submitted = 0
        self._num_submitted_prompt_tokens = 0
        # Sample id -> the writer of its chunks, past the sink.
        self._writers: dict[int, SseWriter] = {}
        # Sample ids of ``generate``, by the ids that its callers gave.
        self._named: dict[str, set[int]] = {}
        self._dead: asyncio.Event | None = None
        self._is_stopped = False
        # Whether new requests are refused, and whether any step begins.
        self._is_closed = False
        self._is_held = False
        # Made by whoever waits for the last sample to end; set then.
        self._idle: asyncio.Event | None = None
        self._compilers = ThreadPoolExecutor(NUM_COMPILE_THREADS, "octavo-compile")

    async def start(self) -> None:
        """Begin to step. The running loop becomes the one that delivers.

        Raises:
            RuntimeError: it has been started before.
        """
        if self._loop is not None:
            raise RuntimeError("this AsyncEngine has been started already")
        self._loop = asyncio.get_running_loop()
        self._dead = asyncio.Event()
        self._engine_loop.start()

    def stop_now(self) -> None:
        """End the engine thread after the step in flight, and every request with an error."""
        self._is_stopped = True
        self._engine_loop.stop()
        if self._loop is not None:
            self._deliver()
        self._fail_all(EngineDeadError("the engine is stopped"))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing is done, while requests run."""
        if self._sinks:
            return False
        self._engine_loop.call(self._engine_loop.core.reset_prefix_cache)
        return True

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Wait up to ``timeout_s`` for running requests, abort the rest, end the engine thread.

        Requests that come meanwhile are served until the time is over, and refused from then on.
        """
        if self._loop is None:
            self._engine_loop.stop()
            return
        self._check_caller()
        await self._wait_idle(timeout_s)
        self._is_stopped = True
        self.abort(list(self._sinks))
        # An abort takes one step.
        await self._wait_idle(STALL_S)
        await asyncio.to_thread(self._engine_loop.stop)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._deliver()
        self._fail_all(EngineDeadError("the engine is stopped"))

    async def pause(self, mode: PauseMode = "abort", *, clear_cache: bool = True) -> None:
        """Generate nothing until ``resume``. Returns when no step is in flight.

        Args:
            mode: "abort" ends the requests that are there, "wait" lets them end; new ones are
                refused. "keep" holds them where they are, and new ones in the queue.
            clear_cache: forget all cached prefixes; requests that are held keep their own.

        Raises:
            ValueError: another mode.
            EngineDeadError: the engine has died meanwhile.
            RuntimeError: not on the event loop that started the engine.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(PauseMode))}, not {mode!r}")
        self._check_caller()
        if mode == "keep":
            await self._hold()
        else:
            self._is_closed = True
            if mode == "abort":
                self.abort(list(self._sinks))
            await self._wait_idle(None)
        if not self.is_alive:
            raise EngineDeadError
        if clear_cache:
            self._engine_loop.call(self._engine_loop.core.reset_prefix_cache)

    async def _hold(self) -> None:
        assert self._loop is not None
        assert self._dead is not None
        loop, is_held = self._loop, asyncio.Event()
        self._is_held = True
        self._engine_loop.hold(lambda: loop.call_soon_threadsafe(is_held.set))
        waits = [asyncio.create_task(event.wait()) for event in (is_held, self._dead)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def resume(self) -> None:
        """End a pause, of whatever mode; without one nothing happens."""
        self._check_caller()
        self._is_closed = False
        if self._is_held:
            self._is_held = False
            self._engine_loop.release()

    @property
    def is_paused(self) -> bool:
        """True from the beginning of ``pause`` to ``resume``."""
        return self._is_closed or self._is_held

    async def _wait_idle(self, timeout_s: float | None) -> None:
        if self._sinks and self.is_alive:
            # One event for all who wait.
            if self._idle is None or self._idle.is_set():
                self._idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)

    @property
    def is_started(self) -> bool:
        """True once ``start`` was called."""
        return self._loop is not None

    @property
    def is_stopped(self) -> bool:
        """True once requests are refused because of ``stop``."""
        return self._is_stopped

    @property
    def is_alive(self) -> bool:
        """False once the engine thread has died; it does not come back."""
        return self._engine_loop.fatal_error is None

    @property
    def is_healthy(self) -> bool:
        """Alive, and making progress if there is work."""
        return self._engine_loop.is_healthy()

    @property
    def num_unfinished(self) -> int:
        """Samples that wait or run."""
        return len(self._sinks)

    async def wait_dead(self) -> None:
        """Return when the engine has died."""
        assert self._dead is not None, "start() first"
        await self._dead.wait()

    def _check_caller(self) -> None:
        """Raises RuntimeError where no delivery would ever come: elsewhere than on the event loop
        that started the engine."""
        if os.getpid() != self._pid:
            raise RuntimeError("this AsyncEngine belongs to the process that forked this one")
        if self._loop is None:
            raise RuntimeError("this AsyncEngine has not been started")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this AsyncEngine belongs to the event loop that started it")

    def submit(
        self,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        sink: Sink,
        *,
        delivery: Delivery = "final",
        sse: Sequence[SseTemplate] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        num_first: int | None = None,
        channels: Channels | None = None,
        grammar: Grammar | None = None,
        reasoning: ReasoningTokens | None = None,
    ) -> list[int]:
        """Queue one request; event-loop thread only.

        Args:
            params: not to be changed any more.
            sink: gets every Delta of every sample on the event loop, or one EngineDeadError per
                sample in place of the rest. ``Delta.extra`` is the prompt's PromptLogprobs, with
                each sample's first token, or a pooling model's vector, float32 [D], at the end.
            delivery, sse, priority, cache_salt, num_first, channels, reasoning: see
                ``EngineLoop.prepare``.
            grammar: what ``compile`` has returned; without it a grammar is compiled here and now.

        Returns:
            One id per sample, consecutive: sample i is ``ids[0] + i``.

        Raises:
            QueueFullError: ``max_num_queued_reqs`` samples, or ``max_num_queued_tokens`` tokens of
                prompts that have no output yet, are there already.
            RequestTooLongError, InvalidParameterError, UnsupportedParameterError: the request can
                never run.
            PausedError: a pause takes no new requests.
            EngineDeadError: the engine has died or is stopped.
            RuntimeError: not on the event loop that started the engine.
        """
        self._check_caller()
        if self._is_stopped:
            raise EngineDeadError("the engine is stopped")
        if self._is_closed:
            raise PausedError
        if self._sinks:
            self._check_queue(params.n)
        samples = self._engine_loop.prepare(
            prompt_token_ids,
            params,
            delivery=delivery,
            sse=sse,
            priority=priority,
            cache_salt=cache_salt,
            num_first=num_first,
            channels=channels,
            grammar=grammar,
            reasoning=reasoning,
        )
        ids = [sample.request_id for sample in samples]
        self._sinks.update(dict.fromkeys(ids, sink))
        self._num_submitted += len(ids)
        self._num_submitted_prompt_tokens += len(ids) * len(prompt_token_ids)
        self._engine_loop.submit(samples)
        return ids

    def _check_queue(self, n: int) -> None:
        """Raises QueueFullError where others leave no room for n more samples.

        Counted as the core has it: what is over there is in nobody's way, read or not.
        """
        most = self.config.max_num_queued_tokens
        if len(self._sinks) + n <= self.max_unfinished and most is None:
            return
        num_ended, num_settled_tokens = self.metrics.settled()
        num_unfinished = self._num_submitted - num_ended
        if num_unfinished and num_unfinished + n > self.max_unfinished:
            raise QueueFullError(f"{num_unfinished} requests are running or waiting already")
        num_queued = self._num_submitted_prompt_tokens - num_settled_tokens
        if most is not None and num_queued >= most:
            raise QueueFullError(f"{num_queued} tokens of prompts are waiting already")

    def write_through(self, request_ids: Iterable[int], writer: SseWriter) -> None:
        """Let a writer take these samples' ``sse`` chunks past their sinks, where it can."""
        for request_id in request_ids:
            if request_id in self._sinks:
                self._writers[request_id] = writer

    def abort(self, request_ids: Iterable[int]) -> None:
        """End samples; each one's sink still gets a last Delta. Unknown ids are ignored."""
        if ids := [request_id for request_id in request_ids if request_id in self._sinks]:
            self._engine_loop.abort(ids)

    async def compile(self, params: SamplingParams) -> Grammar | None:
        """Compile what a request's text is to follow, off the event loop. None: nothing.

        Raises:
            InvalidParameterError: it cannot be followed; names the request's field.
        """
        if params.structured_outputs is None:
            return None
        if (kept := self._engine_loop.grammars.find(params)) is not None:
            return kept
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._compilers, self._engine_loop.grammars.compile, params
        )

    async def encode(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Token ids; a long text is encoded off the event loop."""
        if len(text) <= INLINE_ENCODE_CHARS:
            return self.tokenizer.encode_ids(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode_ids, text, add_special_tokens)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output each time there is more. Leaving the loop aborts it.

        ``params.output_kind`` decides what it holds: all so far, in one object that grows; what is
        new, in an object of its own each time; or all, once, at the end. An ``abort_request`` ends
        it like any other end.

        Raises:
            QueueFullError, RequestTooLongError, InvalidParameterError, UnsupportedParameterError,
                EngineDeadError: as ``submit``.
        """
        params = params.clone()
        add_special_tokens, most = tokenization(tokenization_kwargs, params)
        text, given_ids = prompt_parts(prompt)
        if given_ids is None:
            assert text is not None
            token_ids = await self.encode(text, add_special_tokens)
        else:
            token_ids = checked_ids(given_ids)
        token_ids = truncate(token_ids, most, self.max_model_len)
        kind = params.output_kind
        is_final = kind is RequestOutputKind.FINAL_ONLY
        tokenizer = self.tokenizer if params.detokenize else None
        news: asyncio.Queue[Delta | EngineDeadError] = asyncio.Queue()
        output = RequestOutput.begin(request_id or uuid.uuid4().hex, text, token_ids, params)
        ids = self.submit(
            token_ids,
            params,
            news.put_nowait,
            delivery="final" if is_final else "delta",
            priority=priority,
            cache_salt=prompt_salt(prompt),
            grammar=await self.compile(params),
        )
        named = self._named.setdefault(output.request_id, set())
        named.update(ids)
        try:
            while not output.finished:
                delta = await news.get()
                if isinstance(delta, EngineDeadError):
                    raise delta
                index = delta.request_id - ids[0]
                if kind is RequestOutputKind.DELTA:
                    yield output.take(index, delta, tokenizer)
                    continue
                output.apply(index, delta, tokenizer)
                if output.finished or not is_final:
                    yield output
        finally:
            named.difference_update(ids)
            if not named:
                self._named.pop(output.request_id, None)
            self.abort(ids)

    def abort_request(self, request_ids: Iterable[str]) -> None:
        """End what ``generate`` runs under these ids; each yields a last output."""
        for request_id in request_ids:
            self.abort(self._named.get(request_id, ()))

    # ---------------------------------------------------------------------- delivery

    def _wake_up(self) -> None:
        """On the engine thread: ask the event loop for one delivery."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """On the event loop: hand every sample's deltas to its sink."""
        assert self._loop is not None, "start() first"
        for delta in self._engine_loop.core.outbox.drain(self._writers, self._loop.time()):
            request_id = delta.request_id
            if delta.finish_reason is not None:
                sink = self._sinks.pop(request_id)
                self._writers.pop(request_id, None)
            else:
                sink = self._sinks[request_id]
            sink(delta)
        if not self.is_alive:
            self._fail_all(EngineDeadError())
            if self._dead is not None:
                self._dead.set()
        if not self._sinks and self._idle is not None:
            self._idle.set()

    def _fail_all(self, error: EngineDeadError) -> None:
        sinks, self._sinks = self._sinks, {}
        self._writers.clear()
        for sink in sinks.values():
            sink(error)
