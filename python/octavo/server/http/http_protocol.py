"""HttpProtocol: one connection; bounded request heads, JSON errors, answers written in one go."""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from octavo._core import SseWriter
from octavo.errors import (
    BadRequestError,
    HeaderTooLargeError,
    OctavoError,
    RequestTimeoutError,
    TransferCodingError,
    error_kind,
)
from octavo.server.http import limits
from octavo.server.http.deadline import Deadline

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message


class Application(Protocol):
    """The ASGI application that connections serve."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    def error_body(self, path: str, error: BaseException, request_id: str | None) -> bytes:
        """An error's body in the form of the API that ``path`` belongs to."""


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    The parser itself would gather a head of any size, and would leave HTTP/1.1 where a client
    offers another protocol (``Upgrade``), body and all. RFC 9110, 7.8, lets a server ignore the
    offer: the request is parsed again without it.
    """

    _in_head = True
    # Of the head so far, without what the read held that it began in.
    _head_bytes = 0
    _read_bytes = _first_read_bytes = 0
    # Whether the deadline is that of the head under way.
    _times_head = True
    # Why the head is not acceptable.
    _refusal: OctavoError | None = None
    # A head without the offer to upgrade that it came with, to be parsed in its place.
    _plain_head: bytes | None = None
    # The request being answered; ``cycle`` is the last one read, which may wait behind it.
    _answered: RequestResponseCycle | None = None
    _writer: SseWriter | None = None
    _on_lost: Callable[[], None] | None = None
    # Bytes that waited for the client to read when this was last checked.
    _num_unread = 0
    url = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # For the client to send: a head at first, the next one after each answer.
        self._deadline = Deadline(self.loop, self._on_silence)
        self._deadline.set(limits.MAX_HEAD_S)
        # For the client to read.
        self._read_deadline = Deadline(self.loop, self._on_unread)

    def data_received(self, data: bytes) -> None:
        self._read_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        self._parse(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_bytes > limits.MAX_HEADER_BYTES:
            self._refusal = _too_large()
            self.send_400_response("")
        elif not self._times_head:
            # Most heads come in one piece, and are never timed.
            self._times_head = True
            self._deadline.set(limits.MAX_HEAD_S)

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                head, self._plain_head = self._plain_head, None
                if head is None:  # CONNECT: what follows is for nobody here
                    return
                # A new one: to the old one a request of HTTP/1.0, or the last of its connection, is
                # over and nothing comes after it.
                self.parser = _make_parser(self)
                rest = memoryview(b"".join((head, rest)))
            except httptools.HttpParserError:
                self.send_400_response("")
                return

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        # What this read holds beyond the head's beginning is not known; the exact count follows
        # in on_headers_complete. This one bounds heads that never end.
        self._head_bytes = 0
        self._first_read_bytes = self._read_bytes

    def on_headers_complete(self) -> None:
        self._in_head = self._times_head = False
        self._deadline.lift()
        try:
            # Counting takes microseconds, and nearly all requests are shorter as a whole.
            if self._first_read_bytes + self._head_bytes > limits.MAX_HEADER_BYTES:
                self._check_head_size()
            check_framing(self.headers, self.parser.get_http_version())
        except OctavoError as error:
            # The parser turns it into an error of its own, which _parse answers.
            self._refusal = error
            raise
        offers_upgrade = self.parser.should_upgrade()
        if offers_upgrade and self.parser.get_method() != b"CONNECT":
            self._plain_head = self._head_without_offer()
            return
        super().on_headers_complete()
        if offers_upgrade:
            self.cycle.keep_alive = False
        if self.cycle is not None:
            self.scope["octavo.connection"] = self  # type: ignore[typeddict-unknown-key]
            self.scope["octavo.cycle"] = self.cycle  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        if self._plain_head is None:
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += (b"%b: %b" % pair for pair in self.headers if pair[0] != b"upgrade")
        return b"\r\n".join((*lines, b"", b""))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        if cycle.scope["http_version"] == "1.0":
            # Such a client knows neither interim answers nor chunks.
            cycle.waiting_for_100_continue = False
            app = _ending_with_connection(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _check_head_size(self) -> None:
        size = len(self.parser.get_method()) + len(self.url) + len(b"  HTTP/1.1\r\n\r\n")
        size += sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        if size > limits.MAX_HEADER_BYTES:
            raise _too_large()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            # Until the answer has been read.
            self._deadline.set(limits.MAX_UNREAD_S)
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._times_head:
            self._deadline.set(self.timeout_keep_alive)

    def _on_silence(self) -> None:
        """End a connection whose client has sent no head in time."""
        if self.cycle is not None and not self.cycle.response_complete:
            # Half a head after a request that is still being answered.
            self._deadline.set(limits.MAX_HEAD_S)
        elif self.transport.is_closing() or self.transport.get_write_buffer_size():
            # Closing waits for what has not been read, and would wait for ever.
            self.transport.abort()
        elif self._in_head and self.url:
            self._refusal = RequestTimeoutError("the request's head did not arrive in time")
            self.send_400_response("")
        else:
            self.transport.close()

    def _on_unread(self) -> None:
        """End a connection whose client has read nothing since this was last checked."""
        num_unread = self.transport.get_write_buffer_size()
        if num_unread >= self._num_unread:
            self.transport.abort()
            return
        self._num_unread = num_unread
        self._read_deadline.set(limits.MAX_UNREAD_S)

    # ---------------------------------------------------------- past ASGI, for Exchange

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Call back when the connection is lost: once, and only the last one given."""
        self._on_lost = callback
        if callback is None:
            return
        # A connection that is not read from does not notice its end.
        self.flow.resume_reading()
        if self.transport.is_closing():
            self.loop.call_soon(self._call_on_lost)

    def _call_on_lost(self) -> None:
        callback, self._on_lost = self._on_lost, None
        if callback is not None:
            callback()

    def make_writer(self) -> SseWriter:
        """A writer of parts of the chunked answer under way, past ``cycle.send``.

        The way of nearly every token: a quarter of the cost of ``send``, which needs a task's turn.
        Not while a ``send`` is under way. It takes nothing where the answer has no chunks.
        """
        transport = self.transport
        connection = transport.get_extra_info("socket")
        is_plain = connection is not None and transport.get_extra_info("ssl_object") is None
        writer = SseWriter(
            transport.write,
            transport.get_write_buffer_size,
            connection.fileno() if is_plain else None,
        )
        if self._answered is None or not self._answered.chunked_encoding:
            writer.is_paused = True
            return writer
        writer.is_paused = self.flow.write_paused or self.transport.is_closing()
        self._writer = writer
        return writer

    def pause_writing(self) -> None:
        super().pause_writing()
        self._num_unread = self.transport.get_write_buffer_size()
        self._read_deadline.set(limits.MAX_UNREAD_S)
        if self._writer is not None:
            self._writer.is_paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_deadline.lift()
        if self._writer is not None:
            self._writer.is_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._writer is not None:
            self._writer.is_paused = True
            self._writer = None
        super().connection_lost(exc)
        self._call_on_lost()
        self._deadline.close()
        self._read_deadline.close()

    def send_400_response(self, msg: str) -> None:
        """Answer a head that is not HTTP, or not acceptable as such, and close."""
        error = self._refusal or BadRequestError("invalid HTTP request")
        request_id = secrets.token_hex(16)
        # By as much of the head as was understood: the error takes the form of the path's API.
        path = (self.url or b"").partition(b"?")[0].decode("latin-1")
        app = cast(Application, self.app)
        body = app.error_body(path, error, request_id)
        self.transport.write(
            STATUS_LINE[error_kind(error).status]
            + b"content-type: application/json\r\nconnection: close\r\nx-request-id: "
            + request_id.encode()
            + b"\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        self.transport.close()
        self._deadline.set(limits.MAX_UNREAD_S)


def _make_parser(protocol: HttpProtocol) -> Any:
    parser = httptools.HttpRequestParser(protocol)
    # As the base class has it: after the last request nothing is an error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _too_large() -> HeaderTooLargeError:
    return HeaderTooLargeError(f"the head is larger than {limits.MAX_HEADER_BYTES} bytes")


def check_framing(headers: list[tuple[bytes, bytes]], http_version: str) -> None:
    """Host and Transfer-Encoding by RFC 9112, sections 3.2 and 6.1, as far as the parser does not.

    Raises:
        BadRequestError: not exactly one Host, or a body whose end is in doubt.
        TransferCodingError: a coding that the server does not know.
    """
    host: bytes | None = None
    codings: list[bytes] = []
    # One pass: this is done for every request.
    for name, value in headers:
        if name == b"host":
            if host is not None:
                raise BadRequestError("a request must have one Host header")
            host = value
        elif name == b"transfer-encoding":
            codings += [coding.strip().lower() for coding in value.split(b",")]
    if host is None:
        # HTTP/1.0 knows no Host.
        if http_version != "1.0":
            raise BadRequestError("a request must have one Host header")
    elif not _is_host(host):
        raise BadRequestError("the Host header is not a host")
    if not codings or (codings == [b"chunked"] and http_version != "1.0"):
        return
    if codings.count(b"chunked") != 1 or codings[-1] != b"chunked" or http_version == "1.0":
        raise BadRequestError("the Transfer-Encoding leaves the end of the body in doubt")
    raise TransferCodingError("no transfer coding but chunked is supported")


@functools.lru_cache(maxsize=64)
def _is_host(value: bytes) -> bool:
    """A name or an address, and a port."""
    return re.fullmatch(rb"[\w.~%!$&'()*+;=:\[\]-]*", value) is not None


def take_body(cycle: RequestResponseCycle) -> bytearray | None:
    """The body of a request that has come to its end; None: the rest has to be waited for."""
    if cycle.more_body:
        return None
    body, cycle.body = cycle.body, bytearray()
    return body


def write_answer(cycle: RequestResponseCycle, head: bytes, body: bytes) -> bool:
    """A whole answer of status 200 in one write, past ``cycle.send``: a third of its cost.

    ``head``: header lines, each with its end; they hold the body's length. The answer to a HEAD
    ends with them. Returns whether it was written: if not, the answer has to wait, or to be
    dropped, as ``cycle.send`` does.
    """
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    if cycle.scope["method"] == "HEAD":
        body = b""
    cycle.transport.write(b"".join((*_head_lines(cycle, head), b"\r\n", body)))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True


def write_stream_head(cycle: RequestResponseCycle, head: bytes, data: bytes) -> bool:
    """The head of a chunked answer and its first part, as ``write_answer`` writes a whole one."""
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
        return False
    if cycle.scope["http_version"] == "1.0":
        return False
    cycle.response_started = cycle.chunked_encoding = True
    cycle.waiting_for_100_continue = False
    lines = [*_head_lines(cycle, head), b"transfer-encoding: chunked\r\n\r\n"]
    if data:
        lines.append(b"%x\r\n%b\r\n" % (len(data), data))
    cycle.transport.write(b"".join(lines))
    return True


def _head_lines(cycle: RequestResponseCycle, head: bytes) -> list[bytes]:
    """A head but for its end: what uvicorn adds is the date, and that the connection closes."""
    lines = [STATUS_LINE[200], *(b"%b: %b\r\n" % pair for pair in cycle.default_headers), head]
    if not cycle.keep_alive:
        lines.append(b"connection: close\r\n")
    return lines


def _ending_with_connection(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """``app`` for HTTP/1.0, which has no chunked coding: an answer without a length goes as it is
    and ends with its connection."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def send_plain(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if b"content-length" not in names:
                    cycle.chunked_encoding = False
                    has_length = False
            elif not has_length:
                # ``send`` compares what is written with what was announced.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return run
