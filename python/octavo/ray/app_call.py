"""begin_call: one request through an ASGI application in this process, its answer part by part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

    from octavo.ray.request import Head, RoutedRequest


async def begin_call(
    app: ASGIApp, request: RoutedRequest
) -> tuple[Head, AsyncGenerator[bytes, None]]:
    """The answer's head, and its body as it comes; what has come together is one part.

    Closing the body, or cancelling the task that waits here or reads it, ends the request: its
    samples are aborted.
    """
    news: asyncio.Queue[Message | None] = asyncio.Queue()
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            # The end of the iterator is the client's leaving.
            await asyncio.get_running_loop().create_future()
        is_sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        news.put_nowait(message)

    async def run() -> None:
        try:
            await app(_scope(request), receive, send)
        finally:
            news.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        head = await news.get()
        if head is None:
            await task  # raises why
            raise RuntimeError("the application gave no answer")
    except BaseException:
        await _end(task)
        raise
    return (head["status"], list(head["headers"])), _body(news, task)


async def _body(
    news: asyncio.Queue[Message | None], task: asyncio.Task[None]
) -> AsyncGenerator[bytes, None]:
    try:
        is_over = False
        while not is_over:
            messages = [await news.get()]
            # Each part is a message between processes, dear beside a token.
            while not news.empty():
                messages.append(news.get_nowait())
            is_over = messages[-1] is None
            if part := b"".join(message.get("body", b"") for message in messages if message):
                yield part
        await task
    finally:
        await _end(task)


async def _end(task: asyncio.Task[None]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))


def _scope(request: RoutedRequest) -> Scope:
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "headers": request.headers,
        "client": None,
        "server": None,
    }
    return scope
