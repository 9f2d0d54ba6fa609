"""Replica: an engine and its HTTP application in one actor of Ray's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from octavo.ray.app_call import begin_call
from octavo.server.routes import make_app
from octavo.server.work.state import ServerState

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.engine import AsyncEngine
    from octavo.ray.request import Head, RoutedRequest
    from octavo.server.http.config import ServerConfig

logger = logging.getLogger("octavo.ray")


class Replica:
    """One copy of a model. Constructed and called on the event loop that Ray gives it.

    Ray drains it: on its way out it gets no new requests, and ends once those it has are answered.
    """

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, engine_config: EngineConfig, server_config: ServerConfig
    ) -> None:
        self._state = ServerState(server_config)
        self.app = make_app(self._state)
        self._engine = await asyncio.to_thread(_load, engine_config)
        await self._engine.start()
        self._state.set_engine(self._engine)
        for name, value in self._engine.memory_table:
            logger.info("%s: %s", name, value)

    async def answer(self, request: RoutedRequest) -> AsyncIterator[Head | bytes]:
        """A request's head, then its body; see ``begin_call``."""
        head, body = await begin_call(self.app, request)
        try:
            yield head
            async for part in body:
                yield part
        finally:
            # A request that Ray cancels ends here and now, not when it is collected.
            await body.aclose()

    def check_health(self) -> None:
        """Raises what is wrong; Ray then makes a new replica of this one.

        Raises:
            EngineDeadError, StalledError: the engine died, or does not move.
        """
        self._state.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers for a custom autoscaling policy: samples that wait, and those that run."""
        snapshot = self._engine.metrics.snapshot()
        return {
            "num_waiting": float(snapshot["num_requests_waiting"]),
            "num_running": float(snapshot["num_requests_running"]),
        }

    async def stats(self) -> dict[str, Any]:
        """The core's metrics, as ``Metrics.snapshot`` has them; for tests and measurements."""
        return dict(self._engine.metrics.snapshot())


def _load(config: EngineConfig) -> AsyncEngine:
    # On a thread: torch and the weights take seconds, in which the actor answers Ray.
    from octavo.engine.engine import AsyncEngine

    return AsyncEngine(config)
