"""Generation: the samples of one HTTP request, queued together and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from octavo.errors import ContradictionError, DrainingError, EngineDeadError, GenerationError

if TYPE_CHECKING:
    from octavo._core import Channels, Delta, Grammar, SseTemplate, SseWriter, TokenIds
    from octavo.engine.engine import AsyncEngine
    from octavo.runner.request_state import Delivery
    from octavo.sampling_params import SamplingParams
    from octavo.server.http.http_protocol import HttpProtocol
    from octavo.server.work.tracing import RequestTrace
    from octavo.structured_outputs import ReasoningTokens


class Generation:
    """Queues samples, gathers their news, and aborts what is left when it is closed.

    A context manager: leaving it, by whatever way, leaves nothing in the engine. The client is
    watched while it is open: its disconnect aborts the samples at once and ends every wait with
    ClientDisconnect.

    Args:
        engine: runs the samples.
        connection: the client's; None for a caller in this process, which cannot leave.
        under_way: holds this generation while it is open.
        trace: notes the samples' times.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        connection: HttpProtocol | None,
        under_way: set[Generation],
        trace: RequestTrace | None = None,
    ) -> None:
        self._engine = engine
        self._connection = connection
        self._under_way = under_way
        self._trace = trace
        # Sample id -> choice index, of the samples that are not over.
        self._running: dict[int, int] = {}
        self._news: list[Delta] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._indices: dict[int, int] = {}
        # Takes chunks on their way from the engine while ``news`` waits with nothing before them.
        self._writer: SseWriter | None = None

    def __enter__(self) -> Generation:
        self._under_way.add(self)
        if self._connection is not None:
            self._connection.on_lost(self._client_gone)
        return self

    def __exit__(self, *exception: object) -> None:
        self._under_way.discard(self)
        if self._connection is not None:
            self._connection.on_lost(None)
        self._abort()

    def submit(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        delivery: Delivery,
        sse: Sequence[SseTemplate] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        num_first: Sequence[int | None] = (),
        channels: Channels | None = None,
        grammar: Grammar | None = None,
        reasoning: ReasoningTokens | None = None,
    ) -> None:
        """Queue ``n`` samples of each prompt; sample i of prompt p is choice ``p * n + i``.

        ``sse``: one template per choice. ``num_first``: of pairs for a pooling model, one per
        prompt. ``channels``, ``grammar``, ``reasoning``: see ``AsyncEngine.submit``.

        Raises:
            QueueFullError, RequestTooLongError, InvalidParameterError, UnsupportedParameterError,
                EngineDeadError: from the engine. What was queued before is aborted on exit.
        """
        n = params.n
        if self._trace is not None:
            self._trace.submitted(self._engine.served_model_names[0], params)
        for number, prompt in enumerate(prompts):
            first = number * n
            ids = self._engine.submit(
                prompt,
                params,
                self._take,
                delivery=delivery,
                sse=None if sse is None else sse[first : first + n],
                priority=priority,
                cache_salt=cache_salt,
                num_first=num_first[number] if num_first else None,
                channels=channels,
                grammar=grammar,
                reasoning=reasoning,
            )
            for offset, sample_id in enumerate(ids):
                self._running[sample_id] = self._indices[sample_id] = first + offset

    def write_through(self, writer: SseWriter) -> None:
        """Let ready frames go to this writer from now on, past ``news``."""
        self._writer = writer
        self._engine.write_through(self._running, writer)

    @property
    def is_open(self) -> bool:
        """True while ``news`` has anything left to give, be it an error."""
        return bool(self._running) or self._error is not None

    def index(self, delta: Delta) -> int:
        """The choice that a delta belongs to."""
        return self._indices[delta.request_id]

    def finish(self, delta: Delta) -> None:
        """Account for a sample's end.

        Raises:
            ContradictionError, GenerationError, DrainingError: it did not end by itself.
        """
        self._running.pop(delta.request_id, None)
        if self._trace is not None:
            self._trace.sample_over(self.index(delta), delta)
        if delta.finish_reason == "error":
            if isinstance(delta.stop_reason, str):
                raise ContradictionError(delta.stop_reason)
            raise GenerationError
        if delta.finish_reason == "abort":
            # Nobody waits for a generation's own abort: this one came from the server's shutdown.
            raise DrainingError

    async def news(self) -> list[Delta]:
        """Deltas since the last call, at least one unless ``nudge`` was called.

        Raises:
            ClientDisconnect: the client has closed its connection.
            EngineDeadError: nothing more will come.
        """
        if not self._news and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if self._writer is not None:
                self._writer.is_armed = True
            try:
                await self._waiter
            finally:
                self._waiter = None
                if self._writer is not None:
                    self._writer.is_armed = False
        if self._error is not None:
            raise self._error
        news, self._news = self._news, []
        return news

    async def collect(self) -> list[Delta]:
        """With delivery "final": every choice's one Delta, in order of choice.

        Raises:
            ClientDisconnect, EngineDeadError, GenerationError, DrainingError: as ``news`` and
                ``finish``.
        """
        results: dict[int, Delta] = {}
        while self.is_open:
            for delta in await self.news():
                if delta.finish_reason is not None:
                    self.finish(delta)
                    results[self.index(delta)] = delta
        return [results[index] for index in sorted(results)]

    def nudge(self) -> None:
        """End a wait in ``news`` with nothing new."""
        if self._writer is not None:
            self._writer.is_armed = False
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """End every wait with this error, unless nothing is left to wait for."""
        if self._error is None and self._running:
            self._error = error
        self.nudge()

    def _take(self, delta: Delta | EngineDeadError) -> None:
        """The engine's sink; on the event loop, for every sample's every step."""
        if isinstance(delta, EngineDeadError):
            self.fail(delta)
            self._running.clear()
            return
        self._news.append(delta)
        self.nudge()

    def _abort(self) -> None:
        if self._running:
            self._engine.abort(list(self._running))
            self._running.clear()

    def _client_gone(self) -> None:
        self.fail(ClientDisconnect())
        self._abort()
