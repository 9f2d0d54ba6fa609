"""Exchange: one HTTP request and its answer.

Starlette's request, with a body that is bounded in size and in time; its responses for whole
answers. Streams write tens of thousands of small chunks a second, so nothing is between them and
the protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.errors import BadRequestError, BodyTimeoutError, ContentTypeError
from octavo.server import limits

if TYPE_CHECKING:
    from octavo.server.http_server import HttpProtocol

JSON: Final = "application/json"


class JsonResponse(Response):
    """A whole answer of JSON."""

    media_type = JSON

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return orjson.dumps(content)


class Exchange(Request):
    """A request, and the one answer to it.

    ``is_answered``: whether an answer has begun. ``request_id``: as in the header X-Request-Id.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.is_answered = False
        # What our own protocol offers past ASGI. None: called in this process, as run-batch does;
        # such a client cannot leave.
        self.connection: HttpProtocol | None = scope.get("octavo.connection")
        self.request_id: str = scope["state"]["request_id"]

    # ------------------------------------------------------------------ the request

    async def read_json(self) -> dict[str, Any]:
        """The body, which must be a JSON object.

        Raises:
            ContentTypeError, BodyTooLargeError, BodyTimeoutError, BadRequestError: bad requests.
            ClientDisconnect: the client went away in the middle.
        """
        content_type = self.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != JSON:
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
        length = self.headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            limits.check_body_size(int(length))
        if self.connection is not None and self.connection.has_body():
            # It came with the head: nothing to wait for, no timer.
            body = await self.body()
            limits.check_body_size(len(body))
            return body
        return await self._wait_for_body()

    async def _wait_for_body(self) -> bytes:
        body = bytearray()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.MAX_BODY_SILENCE_S) as silence:
                async for part in self.stream():
                    body += part
                    limits.check_body_size(len(body))
                    silence.reschedule(loop.time() + limits.MAX_BODY_SILENCE_S)
        except TimeoutError:
            raise BodyTimeoutError("the request body did not arrive in time") from None
        return bytes(body)

    # ------------------------------------------------------------------- the answer

    async def respond(self, response: Response) -> None:
        """A whole answer."""
        self.is_answered = True
        await response(self.scope, self._receive, self._send)

    async def respond_json(self, value: Any) -> None:
        """A whole answer of JSON."""
        await self.respond_body(orjson.dumps(value))

    async def respond_body(self, body: bytes) -> None:
        """A whole answer of JSON that is written down already."""
        self.is_answered = True
        head = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self) -> None:
        """Begin an answer of server-sent events."""
        self.is_answered = True
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # nginx would hold chunks back until it has a buffer full.
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def write(self, data: bytes) -> None:
        """A part of the stream; waits while the client's buffers are full."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes = b"") -> None:
        """The stream's last part."""
        await self._send({"type": "http.response.body", "body": data})
