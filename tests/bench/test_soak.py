"""bench/soak.py tells an answer that is late from one that will not come."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    monkeypatch.delitem(sys.modules, "soak", raising=False)
    module = importlib.import_module("soak")
    monkeypatch.setattr(module, "STILL_S", 0.6)
    return module


async def verdict(soak: ModuleType, tokens_a_tick: float, seconds: float) -> str | None:
    """What is wrong with a request that never ends, of a server that computes so many tokens."""
    progress = soak.Progress()
    fault = asyncio.create_task(progress.fault(1))
    until = time.monotonic() + seconds
    while time.monotonic() < until and not fault.done():
        progress.num_tokens += tokens_a_tick
        if tokens_a_tick:
            progress.changed_s = time.monotonic()
        await asyncio.sleep(0.05)
    found: Any = fault.result() if fault.done() else None
    fault.cancel()
    return found


def test_a_slow_server_is_not_a_fault(soak: ModuleType) -> None:
    assert asyncio.run(verdict(soak, 1, 2)) is None


def test_a_server_that_stands_still_is(soak: ModuleType) -> None:
    assert asyncio.run(verdict(soak, 0, 5)) == "WRONG: the server stands still"


def test_an_answer_that_others_overtake_is(soak: ModuleType) -> None:
    found = asyncio.run(verdict(soak, 1e6, 5))
    assert found == "WRONG: no end, though the server runs on"


def test_progress_is_read_from_the_page_of_metrics(soak: ModuleType) -> None:
    text = 'vllm:prompt_tokens_total{model_name="m"} 5.0\nvllm:x_bucket{le="1"} 2\n# HELP x y\n'
    assert soak.numbers(text)["prompt_tokens_total"] == 5
