"""A headless Chromium, and servers for it to look at."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The helpers of the server's tests are modules of their own.
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from fake_engine import FakeTemplate
from harness import RunningServer, StartServer
from scripted_engine import ScriptedEngine

from octavo.server.http.config import ServerConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or the one that ``playwright install chromium`` has fetched.

    Playwright keeps an event loop running in the thread of the tests for as long as it is open:
    it is closed with its file, so that the next file of the process can run a loop of its own.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own)
        if not os.path.exists(path):
            pytest.skip(
                "there is no Chromium: apt install chromium, or playwright install chromium"
            )
        # Its sandbox refuses to be root's, which containers' tests are.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


OpenPage = Callable[..., "Page"]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServer]:
    """``start(said, delay_s=0, names=(), **flags)``: a server whose model says ``said``, in
    Qwen3's form, and is served under ``names``."""
    servers = []

    def run(
        said: str, delay_s: float = 0.0, names: tuple[str, ...] = (), **flags: Any
    ) -> RunningServer:
        monkeypatch.setattr("octavo._core.SseTemplate", FakeTemplate)
        engine = ScriptedEngine([said])
        engine.delay_s = delay_s
        engine.served_model_names = names or engine.served_model_names
        server = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=0.2, **flags))
        servers.append(server)
        server.may_load.set()
        assert server.ready.wait(20)
        return server

    yield run
    for server in servers:
        server.stop()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """``open_page(url, complains=False, **context)``: a fresh browser's page.

    Every complaint of its console fails the test, unless it ``complains`` on purpose.
    """
    complaints: list[str] = []
    contexts = []

    def run(url: str, *, complains: bool = False, **options: Any) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", None), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        if not complains:
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(url)
        return page

    yield run
    for context in contexts:
        context.close()
    # What the network refuses, as the tests mean it to, is told on the console too.
    assert not [text for text in complaints if "Failed to load resource" not in text]
