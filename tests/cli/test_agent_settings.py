"""Settings of agents can be pasted as they are printed."""

from __future__ import annotations

import json
import shlex
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from octavo.cli import main as cli
from octavo.cli.agent_settings import agent_settings
from octavo.cli.serve import print_ready
from octavo.server.http.config import ServerConfig

NAME = 'org/a model\'s "name"'


def parts(text: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(variables that the shell sets, Codex's configuration) of printed settings."""
    lines = text.splitlines()
    exports = [line for line in lines if line.startswith("  export ")]
    words = [word for line in exports for word in shlex.split(line, comments=True)[1:]]
    start = next(i for i, line in enumerate(lines) if line.startswith("Codex"))
    end = next(i for i, line in enumerate(lines) if line.startswith("OpenAI"))
    variables = dict(word.split("=", 1) for word in words)
    return variables, tomllib.loads("\n".join(lines[start + 1 : end]))


@pytest.mark.parametrize(("needs_key", "key"), [(True, "YOUR_KEY"), (False, "none")])
def test_settings_are_read_as_meant(needs_key: bool, key: str) -> None:
    text = agent_settings("http://0.0.0.0:8000", NAME, 40960, needs_key=needs_key)
    variables, codex = parts(text)
    assert variables == {
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:8000",
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_API_KEY": key,
        "ANTHROPIC_MODEL": NAME,
        "ANTHROPIC_SMALL_FAST_MODEL": NAME,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "40960",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "10240",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "OPENAI_BASE_URL": "http://127.0.0.1:8000/v1",
        "OPENAI_API_KEY": key,
    }
    assert codex["model"] == NAME
    assert codex["model_context_window"] == 40960
    provider = codex["model_providers"][codex["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:8000/v1"
    assert provider["wire_api"] == "responses"
    assert provider["supports_websockets"] is False
    assert f"export {provider['env_key']}={key}" in text


class Handler(BaseHTTPRequestHandler):
    """A server's models."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(json.dumps(server.answer).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def running() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status = [], 200
    server.answer = {"data": [{"id": "m", "max_model_len": 4096}]}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_clients_of_a_running_server(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clients", "--url", running.url + "/v1/", "--api-key", "k"]) == 0
    assert running.asked == [("/v1/models", "Bearer k")]
    variables, codex = parts(capsys.readouterr().out)
    assert variables["ANTHROPIC_BASE_URL"] == running.url
    assert (codex["model"], codex["model_context_window"]) == ("m", 4096)


def test_clients_of_none(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    running.status, running.answer = 401, {"error": {"message": "no API key"}}
    assert cli.main(["clients", "--url", running.url]) == 1
    assert "no API key" in capsys.readouterr().err
    assert cli.main(["clients", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "template", "pooling", "prints"),
    [
        ({}, "x", None, True),
        ({"print_clients": False}, "x", None, False),
        ({"uds": "/tmp/s"}, "x", None, False),
        ({}, None, None, False),
        ({"chat_template": "{{ x }}"}, None, None, True),
        ({}, "x", SimpleNamespace(task="embed"), False),
    ],
)
def test_the_start_prints_them(
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    template: str | None,
    pooling: Any,
    prints: bool,
) -> None:
    engine: Any = SimpleNamespace(
        memory_table=[],
        pooling=pooling,
        chat_template=template,
        served_model_names=("m",),
        max_model_len=512,
    )
    print_ready(engine, "http://127.0.0.1:8000", 1.0, ServerConfig(**flags))
    text = capsys.readouterr().out
    assert ("Claude Code:" in text) is prints
    assert ("model_context_window = 512" in text) is prints
