"""Exchange: one HTTP request and its answer.

Starlette's request, with a body that is bounded in size and in time; its responses for whole
answers. Streams write tens of thousands of small chunks a second, so nothing is between them and
the protocol.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo._core import json_size
from octavo.errors import BadRequestError, ContentTypeError, RequestTimeoutError
from octavo.server.http import limits
from octavo.server.http.content_coding import coding_of, decode_body
from octavo.server.http.http_protocol import take_body, write_answer, write_stream_head

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from octavo.server.http.http_protocol import HttpProtocol

JSON: Final = "application/json"
_JSON: Final = JSON.encode()
# Parsing and checking less takes milliseconds, whatever it holds.
MAX_INLINE_BODY_BYTES: Final = 1 << 18
T = TypeVar("T")


@functools.cache
def _stream_headers(media_type: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers of a stream, as ASGI has them and as lines."""
    headers = [
        (b"content-type", media_type.encode()),
        (b"cache-control", b"no-cache"),
        # nginx would hold chunks back until it has a buffer full.
        (b"x-accel-buffering", b"no"),
    ]
    return headers, b"".join(b"%b: %b\r\n" % line for line in headers)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header. ``name``: in lower case, as ASGI has all names."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def _json_object(body: bytes | bytearray) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequestError("the request body must be a JSON object")
    return value


def _parse_large(body: bytes, coding: bytes | None, parse: Callable[[dict[str, Any]], T]) -> T:
    if coding is not None:
        body = decode_body(body, coding)
    limits.check_json_size(*json_size(body))
    return parse(_json_object(body))


class Exchange(Request):
    """A request, and the one answer to it.

    Attributes:
        is_answered: whether an answer has begun.
        request_id: as in the header X-Request-Id.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.is_answered = False
        # What our own protocol offers past ASGI. None: called in this process, as run-batch does;
        # such a client cannot leave.
        self.connection: HttpProtocol | None = scope.get("octavo.connection")
        self._cycle: RequestResponseCycle | None = scope.get("octavo.cycle")
        # Whether nothing has to be added to a whole answer on its way: see App.
        self._is_direct: bool = scope.get("octavo.direct", False)
        self.request_id: str = scope["state"]["request_id"]
        # A RequestTrace of server/work, which stands above this file; None: it is not traced.
        self.trace: Any = None
        self._value: dict[str, Any] | None = None
        self._takes_any_type = False
        # Of the answer, beside those that every answer has.
        self._more_headers: list[tuple[bytes, bytes]] = []

    # ------------------------------------------------------------------ the request

    async def read(self, parse: Callable[[dict[str, Any]], T]) -> T:
        """``parse`` of the body, which must be a JSON object. Large ones leave the event loop.

        Raises:
            ContentTypeError, ContentCodingError, BodyTooLargeError, RequestTimeoutError,
                BadRequestError: bad requests.
            ClientDisconnect: the client went away in the middle.
            InvalidRequestError: from ``parse``.
        """
        if self._value is not None:
            return parse(self._value)
        content_type = header(self.scope, b"content-type") or b""
        if (
            content_type != _JSON
            and content_type.partition(b";")[0].strip().lower() != _JSON
            and not self._takes_any_type
        ):
            raise ContentTypeError("the request's Content-Type must be application/json")
        # Several headers of a name are one list.
        codings = [value for key, value in self.scope["headers"] if key == b"content-encoding"]
        coding = coding_of(b", ".join(codings))
        body = await self._read_body()
        # A small body may be a large one once decoded.
        if coding is None and len(body) <= MAX_INLINE_BODY_BYTES:
            return parse(_json_object(body))
        return await asyncio.to_thread(_parse_large, bytes(body), coding, parse)

    def allow_any_type(self) -> None:
        """Take a body of any declared type for JSON, as curl sends it by default.

        Not from web pages: a type other than JSON's is what they may send to any server.
        """
        self._takes_any_type = header(self.scope, b"origin") is None

    async def peek(self) -> dict[str, Any]:
        """The body before it is parsed; ``read`` parses the same.

        Raises:
            As ``read``.
        """
        self._value = await self.read(lambda value: value)
        return self._value

    async def _read_body(self) -> bytes | bytearray:
        length = header(self.scope, b"content-length") or b""
        if length.isdigit():
            limits.check_body_size(int(length))
        # Where it came with the head there is nothing to wait for, and no timer.
        if self._cycle is None or (body := take_body(self._cycle)) is None:
            return await self._wait_for_body()
        limits.check_body_size(len(body))
        return body

    async def _wait_for_body(self) -> bytes:
        body = bytearray()
        loop = asyncio.get_running_loop()
        latest = loop.time() + limits.MAX_BODY_S
        try:
            async with asyncio.timeout(limits.MAX_BODY_SILENCE_S) as deadline:
                async for part in self.stream():
                    body += part
                    limits.check_body_size(len(body))
                    deadline.reschedule(min(latest, loop.time() + limits.MAX_BODY_SILENCE_S))
        except TimeoutError:
            raise RequestTimeoutError("the request body did not arrive in time") from None
        return bytes(body)

    # ------------------------------------------------------------------- the answer

    def add_header(self, name: bytes, value: bytes) -> None:
        """Add a header to an answer that has not begun. ``name``: in lower case."""
        self._more_headers.append((name, value))

    async def respond(self, response: Response) -> None:
        """A whole answer."""
        self.is_answered = True
        response.raw_headers += self._more_headers
        await response(self.scope, self._receive, self._send)

    async def respond_json(self, value: Any) -> None:
        """A whole answer of JSON."""
        await self.respond_body(orjson.dumps(value))

    async def respond_body(self, body: bytes) -> None:
        """A whole answer: the bytes of a JSON value."""
        self.is_answered = True
        if self._is_direct and self._cycle is not None:
            lines = b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
            lines %= (_JSON, len(body), self.request_id.encode())
            if self._more_headers:
                lines += self._more_lines()
            if write_answer(self._cycle, lines, body):
                return
        headers = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body))]
        headers += self._more_headers
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self, media_type: str, data: bytes = b"") -> None:
        """Begin an answer that comes in parts, ``data`` being the first."""
        self.is_answered = True
        headers, lines = _stream_headers(media_type)
        if self._is_direct and self._cycle is not None:
            lines = b"%bx-request-id: %b\r\n" % (lines, self.request_id.encode())
            if self._more_headers:
                lines += self._more_lines()
            if write_stream_head(self._cycle, lines, data):
                return
        headers = [*headers, *self._more_headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        if data:
            await self.write(data)

    async def write(self, data: bytes) -> None:
        """A part of the stream; waits while the client's buffers are full."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes = b"") -> None:
        """The stream's last part."""
        await self._send({"type": "http.response.body", "body": data})

    def _more_lines(self) -> bytes:
        return b"".join(b"%b: %b\r\n" % line for line in self._more_headers)
