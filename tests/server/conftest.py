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

from octavo.server.config import ServerConfig


@pytest.fixture(autouse=True)
def fake_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine must read what only the core can read in the real one."""
    monkeypatch.setattr("octavo._core.SseTemplate", FakeTemplate, raising=False)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """``start_server(engine=None, ready=True, **server_flags)``."""
    servers = []

    def start(
        engine: FakeEngine | None = None, *, ready: bool = True, **flags: Any
    ) -> RunningServer:
        flags.setdefault("shutdown_timeout", 0.2)
        config = ServerConfig(port=0, **flags)
        server = RunningServer(engine or FakeEngine(), config)
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
