"""Lifecycle: load, serve, drain, and the process's exit status."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from octavo.errors import EngineDeadError
from octavo.server.http.http_server import HttpServer
from octavo.server.routes import make_app
from octavo.server.stats_log import log_stats
from octavo.server.work.state import ServerState

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.api_keys import ApiKeys
    from octavo.server.http.certificates import Certificates
    from octavo.server.http.config import ServerConfig

logger = logging.getLogger("octavo.server")

EXIT_OK: Final = 0
EXIT_ENGINE_DEAD: Final = 1

# Certificates are renewed weeks before they end.
CERTIFICATE_POLL_S: Final = 10.0

# How long answers about the engine's death get to be written.
DEATH_NOTICE_S: Final = 1.0
_POLL_S: Final = 0.02


class Lifecycle:
    """One server from the first bind to the last answer.

    Args:
        config: the front end's flags.
        load: builds the engine; blocks, so it runs on a thread of its own.
    """

    def __init__(self, config: ServerConfig, load: Callable[[], AsyncEngine]) -> None:
        self.config = config
        self.state = ServerState(config)
        self.http = HttpServer(make_app(self.state), config)
        # Whether the loading thread still runs: then the process cannot end in an orderly way.
        self.is_loading = False
        self._load = load
        self._stop = asyncio.Event()

    @property
    def is_stopping(self) -> bool:
        """True once ``stop`` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Begin to drain; on the event loop. Safe to call again."""
        self._stop.set()

    def reload(self) -> None:
        """Read keys and certificates again, for what is to come; on the event loop.

        What cannot be used is logged, and what there was stays.
        """
        parts: dict[str, ApiKeys | Certificates] = {"keys": self.state.api_keys}
        if self.http.certificates is not None:
            parts["certificate"] = self.http.certificates
        for name, part in parts.items():
            try:
                part.reload()
            except ValueError as error:
                logger.error("%s not reloaded: %s", name, error)
            else:
                logger.info("%s reloaded", name)

    async def _watch_certificates(self, certificates: Certificates) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_POLL_S)
            if certificates.is_stale:
                try:
                    certificates.reload()
                except ValueError as error:
                    # Half written, perhaps: they are looked at again.
                    logger.warning("certificate not loaded yet: %s", error)
                else:
                    logger.info("loaded the certificate again")

    async def run(self, on_ready: Callable[[AsyncEngine, str], None]) -> int:
        """Serve until ``stop`` or the engine's death.

        Args:
            on_ready: called once with the engine and the server's URL.

        Returns:
            The process's exit status.

        Raises:
            OSError, ValueError: the address or the model cannot be had.
        """
        await self.http.start()
        watch = None
        if self.config.enable_ssl_refresh and self.http.certificates is not None:
            watch = asyncio.create_task(self._watch_certificates(self.http.certificates))
        try:
            engine = await self._loaded_engine()
            if engine is None:
                return EXIT_OK
            await engine.start()
            self.state.set_engine(engine)
            on_ready(engine, self.http.url)
            return await self._serve(engine)
        finally:
            if watch is not None:
                watch.cancel()
            await self.http.stop()
            if self.state.tracing is not None:
                await asyncio.to_thread(self.state.tracing.close)

    async def _loaded_engine(self) -> AsyncEngine | None:
        """The engine, or None if ``stop`` came first."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[AsyncEngine] = loop.create_future()

        def settle(engine: AsyncEngine | None, error: BaseException | None) -> None:
            self.is_loading = False
            if loaded.cancelled():
                return
            if engine is not None:
                loaded.set_result(engine)
            else:
                loaded.set_exception(error or RuntimeError("no engine"))

        def work() -> None:
            engine, failure = None, None
            try:
                engine = self._load()
            except BaseException as error:
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, engine, failure)

        self.is_loading = True
        # A daemon: Ctrl-C while weights load must not wait for them.
        threading.Thread(target=work, name="octavo-load", daemon=True).start()
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loaded, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not loaded.done():
            loaded.cancel()
            return None
        return loaded.result()

    async def _serve(self, engine: AsyncEngine) -> int:
        stop = asyncio.create_task(self._stop.wait())
        dead = asyncio.create_task(engine.wait_dead())
        stats = None
        if not self.config.disable_log_stats:
            stats = asyncio.create_task(log_stats(engine))
        try:
            await asyncio.wait((stop, dead), return_when=asyncio.FIRST_COMPLETED)
            if not dead.done():
                await self._drain(dead)
            if dead.done():
                await self._die()
                return EXIT_ENGINE_DEAD
            return EXIT_OK
        finally:
            for task in (stop, dead, stats):
                if task is not None:
                    task.cancel()
            await engine.stop(0.0)
            # The clients of what stop() aborts are still answered.
            await self._wait_idle(DEATH_NOTICE_S)

    async def _drain(self, dead: asyncio.Task[None]) -> None:
        """Take no new work; let running requests finish, up to the timeout."""
        self.state.phase = "draining"
        running = len(self.state.generations)
        if running:
            logger.info(
                "draining: %d requests have %g s to end", running, self.config.shutdown_timeout
            )
        await self._wait_idle(self.config.shutdown_timeout, dead)
        if self.state.generations:
            logger.warning("%d requests are cut off", len(self.state.generations))

    async def _die(self) -> None:
        """Fail all that waits for the dead engine, then let the process end."""
        self.state.phase = "dead"
        for generation in list(self.state.generations):
            generation.fail(EngineDeadError())
        await self._wait_idle(DEATH_NOTICE_S)

    async def _wait_idle(self, timeout_s: float, dead: asyncio.Task[None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.state.generations and loop.time() < deadline:
            if dead is not None and dead.done():
                return
            await asyncio.sleep(_POLL_S)
