"""``octavo chat`` and ``octavo complete`` against a scripted server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from octavo.cli import main as cli
from octavo.cli.chat import Client, ClientError


class Handler(BaseHTTPRequestHandler):
    """Records what it is asked; answers with the server's script."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, payload = server.script.pop(0)
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.script = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def chat_stream(*texts: str) -> tuple[int, bytes]:
    events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    events.append({"choices": []})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return 200, (": ping\n\n" + body + "data: [DONE]\n\n").encode()


def test_chat(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.script = [chat_stream("Par", "is 東京")]
    words = ["chat", "--url", scripted.url + "/v1", "--system", "Brief.", "-q", "Capital?"]
    assert cli.main([*words, "--temperature", "0", "--api-key", "k"]) == 0
    assert capsys.readouterr().out == "Paris 東京\n"
    path, body, key = scripted.asked[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer k"
    assert body == {
        "messages": [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": "Capital?"},
        ],
        "temperature": 0.0,
        "stream": True,
    }


def test_a_conversation_is_kept(
    scripted: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one", "", "two"])

    def fake_input(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", fake_input)
    scripted.script = [chat_stream("first"), chat_stream("second")]
    assert cli.main(["chat", "--url", scripted.url]) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    assert [m["content"] for m in scripted.asked[1][1]["messages"]] == ["one", "first", "two"]


def test_complete(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"choices": [{"index": 0, "text": " Paris"}]}
    scripted.script = [(200, f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())]
    assert cli.main(["complete", "The capital is", "--url", scripted.url, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == " Paris\n"
    assert scripted.asked[0][:2] == (
        "/v1/completions",
        {"max_tokens": 3, "prompt": "The capital is", "stream": True},
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((404, b'{"error":{"message":"no such model"}}'), "404: no such model"),
        ((502, b"<html>"), "status 502"),
        ((200, b'data: {"error":{"message":"it broke"}}\n\ndata: [DONE]\n\n'), "it broke"),
    ],
)
def test_errors(
    scripted: Any, answer: tuple[int, bytes], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.script = [answer]
    assert cli.main(["complete", "x", "--url", scripted.url]) == 1
    assert says in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["complete", "x", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from 127.0.0.1:1" in capsys.readouterr().err
    with pytest.raises(ClientError, match="not an http"):
        Client("127.0.0.1:8000")
