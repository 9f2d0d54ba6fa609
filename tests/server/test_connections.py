"""Connections: how long they stay, and whole answers that their clients are slow to take."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually, tiny_server

from octavo.server.http import exchange, http_protocol, http_server, limits

pytestmark = pytest.mark.system

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
    if stream and version == "1.0":
        assert b"transfer-encoding" not in head.lower()
        events = body.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(event.startswith(b"data: ") for event in events[:-1])
    else:
        assert body.endswith(b"0\r\n\r\n" if stream else b"}")


def test_a_stream_of_http_1_0_by_the_core(tmp_path: Path) -> None:
    """The core writes chunks past the protocol; here it must not."""
    server = tiny_server(tmp_path)
    try:
        body = {"prompt": [1, 2, 3], "stream": True, "max_tokens": 40, "ignore_eos": True}
        with server.socket() as sock:
            sock.sendall(request({**body, "seed": 1}, "1.0"))
            answer = read_all(sock)
        with server.socket() as sock:
            sock.sendall(request({**body, "seed": 1}, headers="Connection: close\r\n"))
            chunks = read_all(sock)
    finally:
        server.stop()
    events = answer.partition(b"\r\n\r\n")[2].split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]]
    assert len(texts) > 2
    pieces = re.findall(rb'data: (\{"id".*\})', chunks)
    assert "".join(texts) == "".join(json.loads(p)["choices"][0]["text"] for p in pieces)


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
        written.append(http_protocol.write_answer(*arguments))
        return written[-1]

    class Protocol(http_protocol.HttpProtocol):
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


# ------------------------------------------------------------- offers of another protocol


OFFERS = [
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "Upgrade: TLS/1.2, HTTP/3.0\r\nConnection: keep-alive, Upgrade\r\n",
]


def chunked(body: dict[str, Any], headers: str) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    parts = (data[at : at + 7] for at in range(0, len(data), 7))
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("encode", [request, chunked])
@pytest.mark.parametrize("step", [0, 50])
def test_an_offer_to_upgrade_is_a_request_like_any_other(
    server: RunningServer, offer: str, stream: bool, encode: Any, step: int
) -> None:
    """Its body is read, however it comes, it is answered, and the connection goes on."""
    body = {"prompt": "x", "stream": stream, "max_tokens": 3}
    sent = request(body, headers=offer) if encode is request else chunked(body, offer)
    data = sent * 2 + request(body, headers="Connection: close\r\n")
    with server.socket() as sock:
        for at in range(0, len(data), step or len(data)):
            sock.sendall(data[at : at + (step or len(data))])
            time.sleep(0.001)
        answers = read_all(sock)
    assert answers.count(b"HTTP/1.1 200 ") == 3
    assert answers.count(b"data: [DONE]" if stream else b'"choices":') == 3


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("version", "encode"), [("1.0", request), ("1.1", request), ("1.1", chunked)]
)
def test_an_offer_with_the_last_request_of_its_connection(
    server: RunningServer, offer: str, stream: bool, encode: Any, version: str
) -> None:
    """The end of the connection is asked for, or is HTTP/1.0's rule."""
    body = {"prompt": "x", "stream": stream, "max_tokens": 3}
    if version == "1.1":
        offer = offer.replace("Connection: ", "Connection: close, ")
    sent = request(body, headers=offer) if encode is request else chunked(body, offer)
    with server.socket() as sock:
        sock.sendall(sent.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert answer.count(b"data: [DONE]" if stream else b'"choices":') == 1


def test_an_offer_before_what_is_no_request(server: RunningServer) -> None:
    with server.socket() as sock:
        sock.sendall(request({"prompt": "x"}, headers=OFFERS[0]) + b"nonsense\r\n\r\n")
        answer = read_all(sock)
    assert b"HTTP/1.1 400 " in answer


def test_offers_without_a_body_and_tunnels(server: RunningServer) -> None:
    with server.socket() as sock:
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{OFFERS[0]}\r\n".encode()
        last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        sock.sendall(head * 500 + last)
        answers = read_all(sock)
    assert answers.count(b"HTTP/1.1 200 ") == 501
    with server.socket() as sock:
        sock.sendall(b"CONNECT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n\x16\x03\x01")
        assert read_all(sock).startswith(b"HTTP/1.1 405 ")
    assert server.get("/health").status == 200


# ------------------------------------------------------------------------- compressed bodies


BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()


def bare_deflate(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("X-GZIP", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]) + bytes(100)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", bare_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
)
def test_compressed_bodies_are_read(server: RunningServer, coding: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = server.post(COMPLETION, body, headers)
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("coding", "body", "status", "message"),
    [
        ("br", BODY, 415, "'br' is not supported"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415, "'gzip, gzip' is not supported"),
        ("gzip", BODY, 400, "not valid gzip"),
        ("gzip", gzip.compress(BODY)[:-9], 400, "not valid gzip"),
        ("gzip", gzip.compress(b"") * 1000 + gzip.compress(BODY), 400, "not valid gzip"),
        ("gzip", gzip.compress(BODY) + b"more", 400, "not valid gzip"),
        ("deflate", b"\xff" * 9, 400, "not valid deflate"),
        ("gzip", gzip.compress(b" " * (limits.MAX_BODY_BYTES + 1)), 413, "larger than"),
        ("gzip", gzip.compress(b" " * limits.MAX_BODY_BYTES) * 4, 413, "larger than"),
        ("gzip", gzip.compress(b"{"), 400, "not valid JSON"),
    ],
)
def test_compressed_bodies_that_are_refused(
    server: RunningServer, coding: str, body: bytes, status: int, message: str
) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = server.post(COMPLETION, body, headers)
    assert answer.status == status
    assert message in answer.error["message"]
    if status == 415:
        assert answer.headers["accept-encoding"] == "gzip, deflate"


def test_codings_in_several_headers_are_one_list(server: RunningServer) -> None:
    data = gzip.compress(BODY)
    lines = "Content-Encoding: gzip\r\n" * 2 + f"Content-Length: {len(data)}\r\n"
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}"
    with server.socket() as sock:
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        assert read_all(sock).startswith(b"HTTP/1.1 415 ")


# --------------------------------------------------------------------------- half-closed clients


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_shuts_down_its_side_has_left(
    start_server: StartServer, stream: bool
) -> None:
    """A killed process looks the same; what nobody may be there to read is not computed."""
    server = start_server()
    server.engine.delay_s = 0.2
    with server.socket() as sock:
        sock.sendall(request({"prompt": "x", "max_tokens": 1000, "stream": stream}))
        eventually(lambda: len(server.engine.running) == 1)
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: not server.engine.running)
        assert not read_all(sock).endswith((b"}", b"[DONE]\n\n"))
