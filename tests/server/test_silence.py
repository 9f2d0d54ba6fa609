"""Silent peers: each thing that one can hold has a deadline."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually

from octavo.server.http import http_protocol, http_server, limits

pytestmark = pytest.mark.system

HEAD = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
COMPLETION = "/v1/completions"


def closed_after_s(sock: socket.socket, began: float) -> float:
    """When the server closed it; what it sent before is dropped."""
    sock.settimeout(20)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


@pytest.fixture
def hasty(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    monkeypatch.setattr(limits, "MAX_HEAD_S", 0.5)
    monkeypatch.setattr(limits, "MAX_UNREAD_S", 0.5)
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 60)
    return start_server()


def test_a_connection_that_sends_nothing(hasty: RunningServer) -> None:
    with hasty.socket() as sock:
        assert 0.4 < closed_after_s(sock, time.monotonic()) < 5


@pytest.mark.parametrize("first", [False, True])
def test_half_a_head(hasty: RunningServer, first: bool) -> None:
    """The first one on a connection, or a later one."""
    with hasty.socket() as sock:
        if not first:
            sock.sendall(HEAD)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
            # An idle connection has longer than a head.
            time.sleep(1)
        began = time.monotonic()
        sock.sendall(HEAD[:40])
        data = sock.recv(4096)
        assert data.startswith(b"HTTP/1.1 408 "), data
        assert b'"code":"request_timeout"' in data
        assert 0.4 < closed_after_s(sock, began) < 5


def test_a_byte_now_and_then_is_no_head(hasty: RunningServer) -> None:

    def trickle() -> None:
        for byte in HEAD[:-1]:
            sock.sendall(bytes([byte]))
            time.sleep(0.1)

    with hasty.socket() as sock, pytest.raises(ConnectionError):
        trickle()


def test_a_head_behind_a_request_that_runs_may_take_its_time(hasty: RunningServer) -> None:
    hasty.engine.delay_s = 1.5
    body = b'{"prompt":"x","max_tokens":1}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with hasty.socket() as sock:
        sock.sendall(head + body + HEAD[:40])
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_trickles(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODY_SILENCE_S", 0.5)
    monkeypatch.setattr(limits, "MAX_BODY_S", 1.0)
    with server.socket() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        began = time.monotonic()
        sock.setblocking(False)
        data = b""
        while not data and time.monotonic() - began < 10:
            try:
                data = sock.recv(4096)
            except BlockingIOError:
                # The answer may be there while nothing more can be sent.
                with contextlib.suppress(ConnectionError):
                    sock.send(b" ")
                time.sleep(0.2)
        assert data.startswith(b"HTTP/1.1 408 ")
        assert 0.9 < time.monotonic() - began < 5


def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client has not read waits in the server, not in the kernel."""
    connection_made = http_protocol.HttpProtocol.connection_made

    def made(self: http_protocol.HttpProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection_made(self, transport)

    monkeypatch.setattr(http_protocol.HttpProtocol, "connection_made", made)


def unread(server: RunningServer, body: dict[str, Any], headers: str = "") -> socket.socket:
    """A connection that has asked for much and reads nothing."""
    import json

    payload = json.dumps(body).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    head = (
        f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    sock.sendall(head.encode() + payload)
    return sock


@pytest.mark.parametrize("headers", ["", "Connection: close\r\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, stream: bool, headers: str
) -> None:
    monkeypatch.setattr(limits, "MAX_UNREAD_S", 0.5)
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.5)
    small_buffers(monkeypatch)
    server = start_server()
    lost: list[http_protocol.HttpProtocol] = []
    connection_lost = http_protocol.HttpProtocol.connection_lost

    def noted(self: http_protocol.HttpProtocol, exc: Exception | None) -> None:
        lost.append(self)
        connection_lost(self, exc)

    monkeypatch.setattr(http_protocol.HttpProtocol, "connection_lost", noted)
    body = {"prompt": "x", "n": 100, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with unread(server, {**body, "request_id": "r" * 200}, headers):
        eventually(lambda: server.engine.submitted)
        eventually(lambda: lost, 20)
        eventually(lambda: not server.engine.running)


def test_a_slow_reader_is_not_a_silent_one(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNREAD_S", 0.5)
    small_buffers(monkeypatch)
    server = start_server()
    body = {"prompt": "x", "n": 100, "max_tokens": 100, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    with unread(server, {**body, "request_id": "r" * 200}) as sock:
        sock.settimeout(20)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            part = sock.recv(20_000)
            assert part
            data += part
            time.sleep(0.02)
    assert b"[DONE]" in data
    assert time.monotonic() - began > 1
