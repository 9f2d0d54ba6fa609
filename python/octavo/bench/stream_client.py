"""StreamClient: an HTTP/1.1 client that times server-sent events.

A load generator must cost less than what it measures, so JSON is parsed only where a number is
needed: in the events before the first token of a chat, and in the usage event at the end.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson

_DONE = b"[DONE]"


@dataclass(slots=True)
class StreamTiming:
    """One request's record. Times are time.monotonic() seconds, the same clock in all processes."""

    start_s: float = 0.0
    # None until a chunk with content has arrived.
    first_s: float | None = None
    last_s: float = 0.0
    # Microseconds between chunks with content.
    gaps_us: list[int] = field(default_factory=list)
    num_chunks: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None


def _one_line(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:300]


class _Reply:
    """Collects one response: the body, or the timing of its events."""

    def __init__(self, chat: bool, done: asyncio.Future[None]) -> None:
        self.chat = chat
        self.done = done
        self.timing = StreamTiming()
        self.body = bytearray()
        self.is_stream = False
        self.saw_done = False
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        if not self.is_stream:
            self.body += data
            return
        events = (self._rest + data if self._rest else data).split(b"\n\n")
        self._rest = events.pop()
        for event in events:
            if event.startswith(b"data:"):
                self._on_event(event[5:].lstrip(), now_s)

    def _on_event(self, data: bytes, now_s: float) -> None:
        timing = self.timing
        if data == _DONE:
            self.saw_done = True
        elif data.startswith(b'{"error"'):
            timing.error = _one_line(data)
        elif b'"choices":[]' in data or b'"choices": []' in data:
            self._on_usage(orjson.loads(data).get("usage") or {})
        elif timing.first_s is None:
            if not self.chat or _chat_content(data):
                timing.first_s = timing.last_s = now_s
                timing.num_chunks = 1
        else:
            timing.gaps_us.append(round((now_s - timing.last_s) * 1e6))
            timing.last_s = now_s
            timing.num_chunks += 1

    def _on_usage(self, usage: dict[str, Any]) -> None:
        timing = self.timing
        timing.num_prompt_tokens = usage.get("prompt_tokens", 0)
        timing.num_output_tokens = usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        timing.num_cached_tokens = details.get("cached_tokens") or 0


def _chat_content(data: bytes) -> bool:
    """True if a chat chunk carries text, rather than the role alone."""
    for choice in orjson.loads(data)["choices"]:
        delta = choice["delta"]
        if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
            return True
    return False


class _Connection(asyncio.Protocol):
    """One TCP connection; it dies with its transport and is never used again."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._reply: _Reply | None = None
        self._now_s = 0.0

    def send(self, request: bytes, chat: bool) -> tuple[Any, _Reply]:
        """Write a request; the parser has the status once the reply's ``done`` is."""
        assert self.transport is not None
        parser = self._parser = httptools.HttpResponseParser(self)
        reply = self._reply = _Reply(chat, asyncio.get_running_loop().create_future())
        self.transport.write(request)
        return parser, reply

    def _fail(self, error: Exception) -> None:
        if self._reply is not None and not self._reply.done.done():
            self._reply.done.set_exception(error)

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._fail(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
            assert self._reply is not None
            self._reply.is_stream = True

    def on_body(self, data: bytes) -> None:
        assert self._reply is not None
        self._reply.feed(data, self._now_s)

    def on_message_complete(self) -> None:
        assert self._reply is not None
        if not self._reply.done.done():
            self._reply.done.set_result(None)


class StreamClient:
    """One keep-alive connection to a server, one request at a time; it reconnects when needed.

    Raises:
        ValueError: from construction, for an address that is not http or https.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"not an http address: {base_url!r}")
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._host = url.hostname
        self._port = url.port or (443 if self._tls else 80)
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"Host: {url.netloc}\r\nAccept: */*\r\n{authorization}"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self._connection: _Connection | None = None

    async def connect(self) -> _Connection:
        """The open connection, made if there is none.

        Raises:
            OSError: nobody listens there.
        """
        connection = self._connection
        if connection is None or connection.transport is None or connection.transport.is_closing():
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._tls
            )
            self._connection = connection
        return connection

    def close(self) -> None:
        """Drop the connection; in the middle of an answer the server sees a client that left."""
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()
        self._connection = None

    async def stream(self, path: str, body: bytes, timeout_s: float) -> StreamTiming:
        """POST ``body`` and time its event stream. Failures are in ``error``, never raised."""
        # From before a connection is opened: the wait is the user's.
        start_s = time.monotonic()
        chat = path.endswith("/chat/completions")
        try:
            status, reply = await self._exchange("POST", path, body, timeout_s, chat)
        except (OSError, httptools.HttpParserError) as error:
            self.close()
            now_s = time.monotonic()
            message = f"{type(error).__name__}: {error}"
            return StreamTiming(start_s=start_s, last_s=now_s, error=message)
        timing = reply.timing
        timing.start_s = start_s
        if status != 200 or not reply.is_stream:
            timing.error = f"HTTP {status}: {_one_line(bytes(reply.body))}"
        elif timing.error is None and not reply.saw_done:
            timing.error = "the stream ended without [DONE]"
        elif timing.error is None and timing.first_s is None:
            timing.error = "the stream had no content"
        if timing.error is not None:
            timing.last_s = time.monotonic()
        return timing

    async def json(
        self, method: str, path: str, body: bytes = b"", timeout_s: float = 60.0
    ) -> tuple[int, Any]:
        """(status, parsed answer) of a plain request; the answer is None if it is not JSON.

        Raises:
            OSError: no answer (TimeoutError is one).
        """
        status, reply = await self._exchange(method, path, body, timeout_s, False)
        try:
            return status, orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            return status, None

    async def _exchange(
        self, method: str, path: str, body: bytes, timeout_s: float, chat: bool
    ) -> tuple[int, _Reply]:
        async with asyncio.timeout(timeout_s):
            connection = await self.connect()
            head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{len(body)}\r\n\r\n"
            parser, reply = connection.send(head.encode() + body, chat)
            await reply.done
        if not parser.should_keep_alive():
            self.close()
        return parser.get_status_code(), reply
