"""Exchange: one HTTP request and its answer, over bare ASGI.

Streams write tens of thousands of small chunks a second, so there is no layer between a handler
and the protocol's ``send``: what every answer carries (request id, CORS) is put into its head here.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

import orjson

from octavo.errors import (
    BadRequestError,
    BodyTimeoutError,
    ContentTypeError,
    MethodNotAllowedError,
    error_body,
    error_kind,
)
from octavo.server import limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON: Final = b"application/json"


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""


class Exchange:
    """A request's head and body, and the one answer to it.

    ``receive`` and ``send`` are ASGI's. ``status`` is the answer's, None until it has begun.
    """

    __slots__ = (
        "_send",
        "_write_chunk",
        "headers",
        "method",
        "path",
        "receive",
        "request_id",
        "scope",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        # Our own protocol's short cut; under another ASGI server there is none.
        self._write_chunk: Callable[[bytes], bool] | None = scope.get("octavo.write_chunk")
        self.method: str = scope["method"]
        path: str = scope["path"]
        root_path: str = scope.get("root_path", "")
        self.path = path[len(root_path) :] if root_path and path.startswith(root_path) else path
        self.status: int | None = None
        self.request_id = _request_id(self.header(b"x-request-id"))
        self.headers: list[tuple[bytes, bytes]] = [(b"x-request-id", self.request_id.encode())]

    def header(self, name: bytes) -> bytes | None:
        """The first header of this lower-case name."""
        for key, value in self.scope["headers"]:
            if key == name:
                found: bytes = value
                return found
        return None

    # ------------------------------------------------------------------ the request

    async def read_json(self) -> dict[str, Any]:
        """The body, which must be a JSON object.

        Raises:
            ContentTypeError, BodyTooLargeError, BodyTimeoutError, BadRequestError: bad requests.
            ClientGoneError: the client went away in the middle.
        """
        content_type = self.header(b"content-type") or b""
        if content_type.partition(b";")[0].strip().lower() != JSON:
            raise ContentTypeError("the request's Content-Type must be application/json")
        body = await self._read_body()
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"the request body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadRequestError("the request body must be a JSON object")
        return value

    async def _read_body(self) -> bytes:
        length = self.header(b"content-length")
        if length is not None and length.isdigit():
            limits.check_body_size(int(length))
        first = await self._receive_body()
        if not first.get("more_body"):
            return bytes(first.get("body", b""))
        body = bytearray(first.get("body", b""))
        try:
            more = True
            while more:
                async with asyncio.timeout(limits.MAX_BODY_SILENCE_S):
                    message = await self._receive_body()
                body += message.get("body", b"")
                limits.check_body_size(len(body))
                more = message.get("more_body", False)
        except TimeoutError:
            raise BodyTimeoutError("the request body did not arrive in time") from None
        return bytes(body)

    async def _receive_body(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    # ------------------------------------------------------------------- the answer

    async def respond(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: bytes = JSON,
        headers: Headers = (),
    ) -> None:
        """A whole answer."""
        self.status = status
        head = [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            *headers,
            *self.headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def respond_json(self, value: Any, *, status: int = 200) -> None:
        """A whole answer of JSON."""
        await self.respond(orjson.dumps(value), status=status)

    async def respond_error(self, error: BaseException) -> None:
        """The error's answer, by the table in errors.py."""
        kind = error_kind(error)
        headers = [(key.lower().encode(), value.encode()) for key, value in kind.headers.items()]
        if isinstance(error, MethodNotAllowedError):
            headers.append((b"allow", error.allowed.encode()))
        body = orjson.dumps(error_body(error, self.request_id))
        await self.respond(body, status=kind.status, headers=headers)

    async def start_stream(self) -> None:
        """Begin an answer of server-sent events."""
        self.status = 200
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # nginx would hold chunks back until it has a buffer full.
            (b"x-accel-buffering", b"no"),
            *self.headers,
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def write(self, data: bytes) -> None:
        """A part of the stream; waits while the client's buffers are full."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def try_write(self, data: bytes) -> bool:
        """Write a part of the stream at once, or not at all.

        The way of nearly every token: half the cost of ``write``, which needs a task's turn. Only
        while no ``write`` is under way.

        Returns:
            False, with nothing written, if it has to be ``write``.
        """
        write_chunk = self._write_chunk
        return write_chunk is not None and write_chunk(data)

    async def end_stream(self, data: bytes = b"") -> None:
        """The stream's last part."""
        await self._send({"type": "http.response.body", "body": data})


def _request_id(header: bytes | None) -> str:
    """The client's own id where it is fit to be a header again, else a new one."""
    if header is not None and 0 < len(header) <= limits.MAX_REQUEST_ID_CHARS:
        text = header.decode("latin-1")
        if text.isascii() and text.isprintable():
            return text
    return secrets.token_hex(16)
