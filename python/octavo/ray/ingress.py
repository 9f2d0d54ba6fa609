"""Ingress: the HTTP side of an application on Ray, which hands requests to replicas.

A request whose replica dies before anything of its answer has left is asked again of another. One
that had begun ends with an error in its stream.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.responses import Response, StreamingResponse

from octavo.errors import (
    BodyTooLargeError,
    QueueFullError,
    ReplicaLostError,
    error_kind,
)
from octavo.ray.request import RoutedRequest
from octavo.server.anthropic.errors import error_body as anthropic_error_body
from octavo.server.http import limits
from octavo.server.openai.errors import error_body

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request

    from octavo.ray.request import Head

logger = logging.getLogger("octavo.ray")

# Replicas that may die under one request before its client is told.
MAX_ATTEMPTS: Final = 4
_LOST: Final = (RayActorError, DeploymentUnavailableError)
# Of the connection, not of the answer: Ray's proxy makes its own.
_HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


class Ingress:
    """Takes requests of every path and method. Light: it holds no model."""

    def __init__(self, replicas: DeploymentHandle, max_queued: int) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._max_queued = max_queued

    async def __call__(self, request: Request) -> Response:
        """The answer of one replica."""
        try:
            body = await _read(request)
        except BodyTooLargeError as error:
            return _refusal(request.url.path, error)
        headers = [pair for pair in request.headers.raw if pair[0] not in _HOP_BY_HOP]
        scope = request.scope
        routed = RoutedRequest.of(
            request.method, _path(scope), scope["query_string"], headers, body
        )
        try:
            answer, (status, names), first = await self._begin(routed)
        except BackPressureError:
            return _refusal(
                routed.path, QueueFullError(f"{self._max_queued} requests are waiting already")
            )
        except ReplicaLostError as error:
            return _refusal(routed.path, error)
        response = StreamingResponse(_rest(answer, first, routed.path, names), status)
        response.raw_headers = [pair for pair in names if pair[0] not in _HOP_BY_HOP]
        return response

    async def _begin(self, request: RoutedRequest) -> tuple[Any, Head, bytes]:
        """(the answer under way, its head, its first part): until then all can be asked again.

        Raises:
            ReplicaLostError: replica after replica died.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            # Ray's router reads positional arguments, and divides by the length of their text.
            if request.prompt:
                answer = self._replicas.remote(request)
            else:
                answer = self._replicas.remote(request=request)
            try:
                head = await anext(answer)
                first = await anext(answer, b"")
            except _LOST as error:
                logger.warning("attempt %d of %s: %s", attempt, request.path, type(error).__name__)
            except BaseException:
                # The client has left, or the replica refused: nothing is to run on.
                answer.cancel()
                raise
            else:
                return answer, head, first
        raise ReplicaLostError


async def _read(request: Request) -> bytes:
    """The body.

    Raises:
        BodyTooLargeError: beyond what a replica would take.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        limits.check_body_size(len(body))
    return bytes(body)


def _path(scope: Any) -> str:
    """The path below the application's own prefix."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/" if root and path.startswith(root) else path


async def _rest(
    answer: Any, first: bytes, path: str, headers: list[tuple[bytes, bytes]]
) -> AsyncIterator[bytes]:
    """The body's parts. A replica that dies leaves an error in a stream of events."""
    is_over = False
    try:
        yield first
        async for part in answer:
            yield part
        is_over = True
    except _LOST:
        is_over = True
        media_type = dict(headers).get(b"content-type", b"")
        if not media_type.startswith(b"text/event-stream"):
            # Its length was announced: the connection's early end tells.
            raise
        yield _error_event(path)
    finally:
        if not is_over:
            # The client has left.
            answer.cancel()


def _error_event(path: str) -> bytes:
    body = _error_form(path)(ReplicaLostError(), None)
    name = b"" if path.startswith(("/v1/chat", "/v1/completions")) else b"event: error\n"
    return b"%bdata: %b\n\n" % (name, body)


def _refusal(path: str, error: Exception) -> Response:
    kind = error_kind(error)
    body = _error_form(path)(error, None)
    return Response(body, kind.status, dict(kind.headers or {}), "application/json")


def _error_form(path: str) -> Any:
    return anthropic_error_body if path.startswith("/v1/messages") else error_body
