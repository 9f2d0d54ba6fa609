"""run_batch: a file of requests in OpenAI's batch format, answered without a port.

Each line is ``{"custom_id", "method": "POST", "url", "body"}``; each line of the output holds the
server's answer, or the reason why the line is no request. Answers are written as they come, so that
a batch that is cut short keeps what it has.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TextIO

import orjson
from starlette.types import ASGIApp, Message, Scope

# Routes that a batch may use.
URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
RETRY_S: Final = 0.2


class BatchLineError(ValueError):
    """A line that is no request. ``code`` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input. ``body``: JSON."""

    custom_id: str
    url: str
    body: bytes


@dataclass(slots=True)
class BatchCounts:
    """Lines answered with status 200, and others."""

    num_answered: int = 0
    num_failed: int = 0


def parse_line(line: bytes) -> BatchRequest:
    """Check one line.

    Raises:
        BatchLineError: it is not a request that a batch may hold.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BatchLineError("invalid_json_line", f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        raise BatchLineError("missing_required_parameter", "custom_id must be a string")
    body, url = value.get("body"), value.get("url")
    if value.get("method", "POST") != "POST":
        raise BatchLineError("invalid_method", "method must be POST")
    if url not in URLS:
        raise BatchLineError("invalid_url", f"url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise BatchLineError("invalid_request", "body must be an object")
    if body.get("stream"):
        raise BatchLineError("invalid_request", "stream is not for batches")
    try:
        return BatchRequest(value["custom_id"], url, orjson.dumps(body))
    except orjson.JSONEncodeError as error:
        # JSON may be nested more deeply than it can be written again.
        raise BatchLineError("invalid_request", f"body: {error}") from None


async def run_batch(
    app: ASGIApp,
    lines: Iterable[bytes],
    output: TextIO,
    *,
    concurrency: int,
    on_done: Callable[[], object] = lambda: None,
) -> BatchCounts:
    """Answer every line that is not blank.

    Args:
        app: the server's ASGI application, with its engine loaded.
        lines: read as they are needed.
        output: gets one line per line of input, in the order in which the answers come.
        concurrency: how many requests may be under way.
        on_done: called after each line.
    """
    counts = BatchCounts()
    running: set[asyncio.Task[None]] = set()
    asker = _Asker(app)

    async def answer(line: bytes) -> None:
        result = await _answer(asker, line)
        is_good = result["error"] is None and result["response"]["status_code"] == 200
        counts.num_answered += is_good
        counts.num_failed += not is_good
        output.write(orjson.dumps(result).decode() + "\n")
        output.flush()
        on_done()

    try:
        for line in lines:
            if not line.strip():
                continue
            running.add(asyncio.create_task(answer(line)))
            if len(running) >= concurrency:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        for task in list(running):
            await task
    finally:
        for task in running:
            task.cancel()
    return counts


class _Asker:
    """Asks the application, and counts the requests under way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_asked = 0

    async def ask(self, request: BatchRequest, request_id: str) -> tuple[int, Any]:
        """(status, JSON). A queue that others fill is waited for."""
        while True:
            self._num_asked += 1
            try:
                status, body = await _call(self._app, request, request_id)
            finally:
                self._num_asked -= 1
            is_full = status == 503 and body["error"]["code"] == "queue_full"
            # With no other request under way it will never be emptier.
            if not is_full or not self._num_asked:
                return status, body
            await asyncio.sleep(RETRY_S)


async def _answer(asker: _Asker, line: bytes) -> dict[str, Any]:
    """One line of the output."""
    result: dict[str, Any] = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": None,
        "response": None,
        "error": None,
    }
    try:
        request = parse_line(line)
    except BatchLineError as error:
        result["custom_id"] = _custom_id(line)
        result["error"] = {"code": error.code, "message": str(error)}
        return result
    result["custom_id"] = request.custom_id
    request_id = secrets.token_hex(16)
    status, body = await asker.ask(request, request_id)
    result["response"] = {"status_code": status, "request_id": request_id, "body": body}
    return result


def _custom_id(line: bytes) -> str | None:
    """The custom_id of a line that is no request, where it has one."""
    try:
        custom_id = orjson.loads(line)["custom_id"]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return None
    return custom_id if isinstance(custom_id, str) else None


async def _call(app: ASGIApp, request: BatchRequest, request_id: str) -> tuple[int, Any]:
    """(status, JSON) of one POST to the application."""
    status = 0
    parts: list[bytes] = []
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            # A client that waits for its answer sends nothing more.
            await asyncio.get_running_loop().create_future()
        is_sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": request.url,
        "raw_path": request.url.encode(),
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return status, orjson.loads(b"".join(parts))
