"""Connections: how long they stay, and whole answers that their clients are slow to take."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually

from octavo.server.http import exchange, http_server

COMPLETION = "/v1/completions"


def request(body: dict[str, Any], version: str = "1.1", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {COMPLETION} HTTP/{version}\r\nHost: localhost\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("version", "headers"), [("1.1", "Connection: close\r\n"), ("1.0", ""), ("1.0", "X-A: b\r\n")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_is_not_to_be_kept(
    server: RunningServer, version: str, headers: str, stream: bool
) -> None:
    with server.socket() as sock:
        sock.sendall(request({"prompt": "x", "stream": stream}, version, headers))
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close" in head
    assert body.endswith(b"0\r\n\r\n" if stream else b"}")


@pytest.mark.parametrize("stream", [False, True])
def test_headers_are_the_same_on_either_way(start_server: StartServer, stream: bool) -> None:
    """With CORS an answer passes through all layers; without, it is written at once."""
    plain, layered = start_server(), start_server(allowed_origins=("https://a.example",))
    body = {"prompt": "x", "stream": stream}
    sent = {"X-Request-Id": "one"}
    first = plain.post(COMPLETION, body, sent)
    second = layered.post(COMPLETION, body, {**sent, "Origin": "https://a.example"})
    found = {k.lower(): v for k, v in second.headers.items()}
    cors = {k: found.pop(k) for k in list(found) if k.startswith("access-control-")}
    cors["vary"] = found.pop("vary")
    assert cors["access-control-allow-origin"] == "https://a.example"
    own = {k.lower(): v for k, v in first.headers.items()}
    # The lengths of two answers' times differ, and a second may end between them.
    for headers in (own, found):
        assert headers.pop("date").endswith(" GMT")
        headers.pop("content-length", None)
    assert own == found


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.5)
    server = start_server()
    with server.socket() as sock:
        sock.settimeout(10)
        # Two in a row, the second of which takes longer than a connection may idle.
        sock.sendall(request({"prompt": "x", "max_tokens": 1}))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        server.engine.delay_s = 0.8
        sock.sendall(request({"prompt": "x", "max_tokens": 1}))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        answered = time.monotonic()
        assert sock.recv(1 << 16) == b""
        assert 0.4 < time.monotonic() - answered < 3


def test_a_client_slow_to_read_whole_answers_gets_each(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the kernel's buffers hold, asked for in one go."""
    texts = [f"{number:04d}" + "x" * 100 for number in range(1024)]
    body = {"prompt": texts, "echo": True, "max_tokens": 0, "n": 4}
    num_requests = 4
    written = []

    def write_answer(*arguments: Any) -> bool:
        written.append(http_server.write_answer(*arguments))
        return written[-1]

    class Protocol(http_server.HttpProtocol):
        def connection_made(self, transport: Any) -> None:
            # A size that is asked for does not grow; kernels' own differ, up to tens of megabytes.
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            super().connection_made(transport)

    monkeypatch.setattr(exchange, "write_answer", write_answer)
    monkeypatch.setattr(http_server, "HttpProtocol", Protocol)
    server = start_server()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(30)
        sock.sendall(
            request(body) * (num_requests - 1) + request(body, "1.1", "Connection: close\r\n")
        )
        # One was written at once, and the next has to wait for room.
        eventually(lambda: written[:2] == [True, False], 30)
        data = read_all(sock)
    for _ in range(num_requests):
        head, _, data = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        # Beyond both buffers and what a transport takes before it pauses its writer.
        assert length > 1 << 18
        answer, data = json.loads(data[:length]), data[length:]
        assert [choice["text"] for choice in answer["choices"][::4]] == texts
    assert data == b""
