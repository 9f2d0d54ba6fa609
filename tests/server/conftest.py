"""A real server over a FakeEngine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The helpers beside this file are modules of their own, not part of a package.
sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine, FakeTemplate
from harness import RunningServer, StartServer

from octavo.server.http.config import ServerConfig


@pytest.fixture
def start_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServer]:
    """``start_server(engine=None, ready=True, **server_flags)``."""
    servers = []

    def start(engine: Any = None, *, ready: bool = True, **flags: Any) -> RunningServer:
        engine = engine or FakeEngine()
        if isinstance(engine, FakeEngine):
            # It must read what only the core can read in the real one.
            monkeypatch.setattr("octavo._core.SseTemplate", FakeTemplate)
        flags.setdefault("shutdown_timeout", 0.2)
        config = ServerConfig(port=0, **flags)
        server = RunningServer(engine, config)
        servers.append(server)
        if ready:
            server.may_load.set()
            assert server.ready.wait(20)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    return start_server()
