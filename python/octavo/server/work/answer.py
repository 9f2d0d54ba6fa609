"""answer: the way of every request for text, from its body to the last byte, in any dialect."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import ClientDisconnect

from octavo.errors import OctavoError, RequestTooLongError
from octavo.server.work.dialect import Request
from octavo.server.work.generation import Generation
from octavo.server.work.load_report import add_load_report
from octavo.server.work.news import Untouched
from octavo.server.work.usage import Usage

if TYPE_CHECKING:
    from octavo._core import Delta, Grammar, SseWriter
    from octavo.runner.request_state import Delivery
    from octavo.sampling_params import SamplingParams
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.dialect import Dialect, Reply
    from octavo.server.work.news import News
    from octavo.server.work.request import GenerationRequest
    from octavo.server.work.state import ServerState

logger = logging.getLogger("octavo.server")

# The head waits for the first token, so that an early failure still gets a status of its own, but
# not longer than this: a client behind a long queue should see that it has been let in.
HEAD_WAIT_S: Final = 1.0

# Writing down this many positions takes about a millisecond; more leave the event loop, where other
# streams' tokens pass.
INLINE_SCORES: Final = 256


class Silence:
    """Nudges a generation that has had no news for a while. One timer, not one per token.

    ``ping_s``: a while, once something has been written; 0 is for ever. ``writer``: what writes
    past ``written``, once there is one.
    """

    def __init__(self, generation: Generation, ping_s: float) -> None:
        self._generation = generation
        self._ping_s = ping_s or math.inf
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()
        self._limit = HEAD_WAIT_S
        self._timer = self._loop.call_later(HEAD_WAIT_S, self._check)
        self.writer: SseWriter | None = None

    def written(self) -> None:
        """Note that something has left for the client."""
        self._last_write = self._loop.time()
        self._limit = self._ping_s

    def close(self) -> None:
        """End the nudges."""
        self._timer.cancel()

    def _check(self) -> None:
        if self._limit == math.inf:
            return
        if self.writer is not None:
            self._last_write = max(self._last_write, self.writer.last_write_s)
        waited = self._loop.time() - self._last_write
        if waited >= self._limit:
            self._generation.nudge()
            waited = 0.0
        self._timer = self._loop.call_later(max(self._limit - waited, 0.01), self._check)


async def answer(dialect: Dialect[Request], state: ServerState, exchange: Exchange) -> None:
    """Read a request for text, generate ``n`` samples of each prompt, write them.

    Raises:
        OctavoError: nothing has been written yet.
        ClientDisconnect: there is nobody to write to; the samples are aborted.
    """
    request = await exchange.read(dialect.parse)
    model = state.model_for_work(request.model, takes_any=request.takes_any_model)
    model.check_generates()
    request.configure(state.config)
    request.check(model.engine)
    params = request.sampling_params(model.engine.generation_defaults)
    reply = await dialect.reply(request, model, exchange.request_id)
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        await _answer_untouched(exchange, dialect, request, reply, model.engine.max_model_len)
        return
    if reply.plan.constraint is not None:
        params = dataclasses.replace(params, structured_outputs=reply.plan.constraint)
    grammar = None
    if params.structured_outputs is not None:
        grammar = await model.engine.compile(params)
    with Generation(
        model.engine, exchange.connection, state.generations, exchange.trace
    ) as generation:
        is_ready = _submit(generation, request, params, reply, grammar)
        if request.stream:
            ping_s = state.config.sse_keep_alive_interval
            await _stream(
                exchange, generation, dialect, reply, request.n, ping_s=ping_s, is_ready=is_ready
            )
            return
        news = await generation.collect()
        add_load_report(exchange, model.engine)
        await _answer_whole(exchange, reply, news, request.n)


def _submit(
    generation: Generation,
    request: GenerationRequest,
    params: SamplingParams,
    reply: Reply,
    grammar: Grammar | None,
) -> bool:
    """Queue the samples. Returns whether the core makes their frames of text."""
    templates = reply.templates() if request.stream else None
    delivery: Delivery = "final"
    if request.stream:
        delivery = "delta" if templates is None else "sse"
    try:
        generation.submit(
            reply.prompts,
            params,
            delivery=delivery,
            sse=templates,
            priority=request.priority,
            cache_salt=request.cache_salt,
            channels=reply.plan.channels,
            grammar=grammar,
            reasoning=reply.plan.reasoning,
        )
    except RequestTooLongError as error:
        error.param = reply.prompt_field
        raise
    return templates is not None


async def _answer_whole(exchange: Exchange, reply: Reply, news: Sequence[News], n: int) -> None:
    usage = Usage(n, counts_reasoning=reply.plan.channels is not None)
    for index, one in enumerate(news):
        usage.add(index, one)
        _take_scores(reply, index // n, one)
    if sum(map(len, reply.scores.values())) > INLINE_SCORES:
        body = await asyncio.to_thread(reply.whole, news, usage)
    else:
        body = reply.whole(news, usage)
    await exchange.respond_body(body)


async def _stream(
    exchange: Exchange,
    generation: Generation,
    dialect: Dialect[Any],
    reply: Reply,
    n: int,
    *,
    ping_s: float,
    is_ready: bool,
) -> None:
    """Write every sample's frames as they come.

    ``ping_s``: the silence after which the client gets a sign of life; 0: never. ``is_ready``: the
    core makes the frames of text.

    Raises:
        OctavoError: the generation failed before anything was written. Later failures are written
            into the stream.
        ClientDisconnect: there is nobody to write to.
    """
    usage = Usage(n, counts_reasoning=reply.plan.channels is not None)
    silence = Silence(generation, ping_s)
    opened: set[int] = set()
    try:
        is_over = has_begun = False
        while not is_over:
            news = await generation.news()
            if not exchange.is_answered:
                _raise_early_failure(generation, news)
            frames = _frames(generation, reply, news, usage, opened)
            if not news and exchange.is_answered:
                frames = dialect.ping if has_begun else dialect.early_ping
            has_begun |= bool(news)
            is_over = not generation.is_open
            # Nothing leaves of reasoning that the client does not see: to it, that is silence.
            has_written = bool(frames) or not exchange.is_answered
            # What leaves together leaves in one write: each is a system call.
            if not exchange.is_answered:
                await exchange.start_stream(dialect.media_type, frames)
                if is_ready and exchange.connection is not None:
                    silence.writer = exchange.connection.make_writer()
                    generation.write_through(silence.writer)
                frames = b""
            if is_over:
                await exchange.end_stream(frames + reply.close(usage))
            elif frames:
                await exchange.write(frames)
            if has_written:
                silence.written()
    except (ClientDisconnect, asyncio.CancelledError):
        raise
    except Exception as error:
        if not exchange.is_answered:
            raise
        # A drain or the engine's death explains itself; what is unforeseen needs its traceback.
        unforeseen = None if isinstance(error, OctavoError) else error
        logger.error(
            "request %s failed in its stream: %r", exchange.request_id, error, exc_info=unforeseen
        )
        await exchange.end_stream(reply.error(error))
    finally:
        silence.close()


def _raise_early_failure(generation: Generation, news: list[Delta]) -> None:
    for delta in news:
        if delta.finish_reason in ("error", "abort"):
            generation.finish(delta)


def _frames(
    generation: Generation, reply: Reply, news: list[Delta], usage: Usage, opened: set[int]
) -> bytes:
    """The frames of all news, joined; those that the core has written as they are."""
    frames = []
    for delta in news:
        index = generation.index(delta)
        _take_scores(reply, index // usage.n, delta)
        is_over = delta.finish_reason is not None
        ready = delta.sse
        if ready is not None:
            frames.append(ready)
            # Calls, and what came after one, are not among the core's frames.
            if delta.pieces and not is_over:
                frames.append(reply.text(index, delta))
        else:
            if index not in opened:
                opened.add(index)
                frames.append(reply.start(index))
            if not is_over:
                frames.append(reply.text(index, delta))
        if is_over:
            generation.finish(delta)
            usage.add(index, delta)
            frames.append(reply.end(index, delta))
    return b"".join(frames)


def _take_scores(reply: Reply, prompt: int, news: News) -> None:
    """Keep the logprobs of a prompt, which the first news of each of its samples brings."""
    if news.extra is not None:
        reply.scores[prompt] = news.extra


async def _answer_untouched(
    exchange: Exchange,
    dialect: Dialect[Any],
    request: GenerationRequest,
    reply: Reply,
    max_model_len: int,
) -> None:
    """Answer ``max_tokens: 0`` without prompt logprobs: nothing is to be computed."""
    for prompt in reply.prompts:
        if len(prompt) > max_model_len:
            raise RequestTooLongError(len(prompt), max_model_len, reply.prompt_field)
    news = [Untouched(len(prompt)) for prompt in reply.prompts for _ in range(request.n)]
    if not request.stream:
        await _answer_whole(exchange, reply, news, request.n)
        return
    usage = Usage(request.n, counts_reasoning=reply.plan.channels is not None)
    frames = []
    for index, one in enumerate(news):
        usage.add(index, one)
        frames += [reply.start(index), reply.end(index, one)]
    await exchange.start_stream(dialect.media_type)
    await exchange.end_stream(b"".join([*frames, reply.close(usage)]))
