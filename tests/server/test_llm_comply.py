"""llm-comply's profiles of responses and messages; what fails is what docs/agents.md says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from harness import RunningServer, StartServer
from scripted_engine import ScriptedEngine, call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_comply") is None, reason="llm-comply is not installed"
)


class SuiteEngine(ScriptedEngine):
    """Calls the suite's tool where there is one, and counts otherwise."""

    def __init__(self, *, thinks: bool) -> None:
        super().__init__([""])
        self._thought = "<think>\nHm.\n</think>\n\n" if thinks else ""

    def submit(self, prompt_token_ids: Any, *arguments: Any, **options: Any) -> list[int]:
        prompt = self.tokenizer.decode(list(prompt_token_ids), False)
        if '"name": "get_weather"' in prompt:
            said = call("get_weather", '{"location": "San Francisco"}').partition("</think>\n\n")[2]
        else:
            said = "1, 2, 3, 4, 5."
        self.turns = [self._thought + said]
        return super().submit(prompt_token_ids, *arguments, **options)


def failures(server: RunningServer, form: str, *options: str) -> dict[str, list[str]]:
    """Errors of the tests that fail, by their ids; some must pass."""
    command = [sys.executable, "-m", "llm_comply.cli", "--json", "--format", form]
    command += ["-u", server.url + "/v1", "-k", "key", "-m", "alias", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    results = json.loads(done.stdout)["results"]
    assert sum(one["status"] == "passed" for one in results) >= 6, done.stdout
    return {one["id"]: one["errors"] for one in results if one["status"] == "failed"}


@pytest.mark.parametrize("thinks", [False, True])
def test_anthropic(start_server: StartServer, thinks: bool) -> None:
    server = start_server(SuiteEngine(thinks=thinks), api_key=("key",))
    options = ("--auth-header", "x-api-key", "--no-bearer", "-H", "anthropic-version:2023-06-01")
    assert failures(server, "anthropic", *options).keys() == {"anth-image-input"}


@pytest.mark.parametrize("thinks", [False, True])
def test_open_responses(start_server: StartServer, thinks: bool) -> None:
    server = start_server(SuiteEngine(thinks=thinks), api_key=("key",))
    found = failures(server, "open-responses")
    # OpenAI's name of the event, where the suite knows another.
    streams = {name: found.pop(name) for name in list(found) if name.startswith("streaming")}
    assert bool(streams) is thinks
    for errors in streams.values():
        assert all("response.reasoning_text." in error for error in errors)
    assert found.keys() == {"image-input", "error-handling"}
