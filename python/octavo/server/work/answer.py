"""answer: run a request's samples and write what they say, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import orjson
from starlette.requests import ClientDisconnect

from octavo.errors import RequestTooLongError, UnsupportedParameterError, error_body
from octavo.prompt_logprobs import PromptLogprobs
from octavo.server.work.generation import Generation
from octavo.server.work.usage import Usage
from octavo.server.work.wire import DONE, add_timings, sse_event

if TYPE_CHECKING:
    from octavo._core import Delta, SseTemplate, SseWriter, TokenIds
    from octavo.engine.request import Delivery
    from octavo.sampling_params import SamplingParams
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState
    from octavo.server.work.wire import Wire

logger = logging.getLogger("octavo.server")

# Proxies close connections that are silent for 30 or 60 seconds. A comment is no event.
PING_S: Final = 15.0
PING: Final = b": ping\n\n"

# The head waits for the first token, so that an early failure still gets a status of its own, but
# not longer than this: a client behind a long queue should see that it has been let in.
HEAD_WAIT_S: Final = 1.0


# Writing down this many positions takes about a millisecond; more leave the event loop, where other
# streams' tokens pass.
INLINE_SCORES: Final = 256


class Silence:
    """Nudges a generation that has had no news for a while. One timer, not one per token.

    ``writer``: writes past ``written``, once there is one.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()
        self._limit = HEAD_WAIT_S
        self._timer = self._loop.call_later(HEAD_WAIT_S, self._check)
        self.writer: SseWriter | None = None

    def written(self) -> None:
        """Something has left for the client."""
        self._last_write = self._loop.time()
        self._limit = PING_S

    def close(self) -> None:
        """No more nudges."""
        self._timer.cancel()

    def _check(self) -> None:
        if self.writer is not None:
            self._last_write = max(self._last_write, self.writer.last_write_s)
        waited = self._loop.time() - self._last_write
        if waited >= self._limit:
            self._generation.nudge()
            waited = 0.0
        self._timer = self._loop.call_later(max(self._limit - waited, 0.01), self._check)


async def answer(
    state: ServerState,
    exchange: Exchange,
    wire: Wire,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
) -> None:
    """Generate ``n`` samples of each prompt and answer with them.

    Raises:
        OctavoError: nothing has been written yet.
        ClientDisconnect: there is nobody to write to; the samples are aborted.
    """
    request = wire.request
    engine = state.engine_for_work()
    if request.priority and engine.config.scheduling_policy != "priority":
        raise UnsupportedParameterError(
            "priority needs a server with --scheduling-policy priority", "priority"
        )
    delivery: Delivery = "final"
    templates: list[SseTemplate] | None = None
    if request.stream:
        delivery = "delta"
        if wire.is_plain:
            delivery = "sse"
            templates = [wire.sse_template(i) for i in range(len(prompts) * params.n)]
    if params.prompt_logprobs is not None:
        wire.scores = [PromptLogprobs(params.prompt_logprobs) for _ in prompts]
    with Generation(state, engine, exchange.connection) as generation:
        try:
            generation.submit(
                prompts,
                params,
                delivery=delivery,
                sse=templates,
                priority=request.priority,
                cache_salt=request.cache_salt,
                scores=wire.scores,
            )
        except RequestTooLongError as error:
            error.param = wire.prompt_field
            raise
        if request.stream:
            await _stream(exchange, generation, wire)
            return
        deltas = await generation.collect()
    if sum(scores.num_recorded for scores in wire.scores) > INLINE_SCORES:
        body = await asyncio.to_thread(lambda: orjson.dumps(wire.answer(deltas)))
        await exchange.respond_body(body)
    else:
        await exchange.respond_json(wire.answer(deltas))


async def _stream(exchange: Exchange, generation: Generation, wire: Wire) -> None:
    """Write every choice's chunks as they come, then usage if it is wanted, then ``[DONE]``.

    Raises:
        OctavoError: the generation failed before anything was written. Later failures are written
            into the stream.
        ClientDisconnect: there is nobody to write to.
    """
    tally = Usage(wire.request.n)
    silence = Silence(generation)
    plain = wire.is_plain
    opened: set[int] = set()

    try:
        is_over = False
        while not is_over:
            news = await generation.news()
            if not exchange.is_answered:
                _raise_early_failure(generation, news)
            if not news:
                events = PING if exchange.is_answered else b""
            elif plain:
                events = _plain_events(generation, news, tally)
            else:
                events = _decorated_events(generation, wire, news, tally, opened)
            is_over = not generation.is_open
            # What leaves together leaves in one write: each is a system call.
            if not exchange.is_answered:
                await exchange.start_stream(events)
                if plain and exchange.connection is not None:
                    silence.writer = exchange.connection.make_writer()
                    generation.write_through(silence.writer)
                events = b""
            if is_over:
                end = wire.usage_event(tally) if wire.request.include_usage else b""
                await exchange.end_stream(events + end + DONE)
            elif events:
                await exchange.write(events)
            silence.written()
    except (ClientDisconnect, asyncio.CancelledError):
        raise
    except Exception as error:
        if not exchange.is_answered:
            raise
        logger.exception("request %s failed in its stream", exchange.request_id)
        await exchange.end_stream(sse_event(error_body(error, exchange.request_id)) + DONE)
    finally:
        silence.close()


def _raise_early_failure(generation: Generation, news: list[Delta]) -> None:
    for delta in news:
        if delta.finish_reason in ("error", "abort"):
            generation.finish(delta)


def _plain_events(generation: Generation, news: list[Delta], tally: Usage) -> bytes:
    """The core's own bytes, joined: what has arrived since the last write leaves as one."""
    events = []
    for delta in news:
        event = delta.sse or b""
        if delta.finish_reason is not None:
            generation.finish(delta)
            tally.add(generation.index(delta), delta)
            event = add_timings(event, delta)
        events.append(event)
    return b"".join(events)


def _decorated_events(
    generation: Generation, wire: Wire, news: list[Delta], tally: Usage, opened: set[int]
) -> bytes:
    events = []
    for delta in news:
        index = generation.index(delta)
        if index not in opened:
            opened.add(index)
            events.append(wire.first_event(index))
        if delta.finish_reason is not None:
            generation.finish(delta)
            tally.add(index, delta)
        events.append(wire.delta_event(index, delta))
    return b"".join(events)
