"""App: the routes, and the way of every request through access, handler and errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from octavo.errors import (
    BadRequestError,
    DrainingError,
    LoadingError,
    MethodNotAllowedError,
    OctavoError,
    QueueFullError,
    RequestTooLongError,
    RouteNotFoundError,
    error_kind,
)
from octavo.sampling_params import InvalidParameterError
from octavo.server import health, models
from octavo.server.access import Access
from octavo.server.chat import chat_completions
from octavo.server.completions import completions
from octavo.server.exchange import ClientGoneError, Exchange, Receive, Scope, Send
from octavo.server.metrics import metrics
from octavo.server.state import ServerState
from octavo.server.tokenize import detokenize, tokenize

logger = logging.getLogger("octavo.server")

Handler = Callable[[ServerState, Exchange], Awaitable[None]]

ROUTES: Final[Mapping[str, Mapping[str, Handler]]] = {
    "/v1/chat/completions": {"POST": chat_completions},
    "/v1/completions": {"POST": completions},
    "/v1/models": {"GET": models.list_models},
    "/tokenize": {"POST": tokenize},
    "/detokenize": {"POST": detokenize},
    "/health": {"GET": health.health},
    "/ready": {"GET": health.ready},
    # SageMaker's name for it, by either method.
    "/ping": {"GET": health.health, "POST": health.health},
    "/version": {"GET": health.version},
    "/load": {"GET": health.load},
    "/metrics": {"GET": metrics},
}
# Paths whose rest is a parameter.
PREFIX_ROUTES: Final[Mapping[str, Mapping[str, Handler]]] = {
    "/v1/models/": {"GET": models.get_model},
}

# The routes whose refusals are counted: a probe of a loading server is none.
_ADMITTING: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
# Refusals that an operator counts: the server's state, not the client's mistake.
_COUNTED: Final = (QueueFullError, DrainingError, LoadingError, RequestTooLongError)


class App:
    """The ASGI application over one ServerState."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._access = Access(state.config)
        self._logs_requests = state.config.enable_log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r} is not served")
        began = time.monotonic()
        exchange = Exchange(scope, receive, send)
        try:
            await self._handle(exchange)
        except ClientGoneError:
            # Whatever ran for it has been aborted; there is nobody to tell.
            exchange.status = exchange.status or 499
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self._answer_error(exchange, error)
        if self._logs_requests:
            logger.info(
                "%s %s %s %.1f ms %s",
                exchange.method,
                exchange.path,
                exchange.status,
                (time.monotonic() - began) * 1000,
                exchange.request_id,
            )

    async def _handle(self, exchange: Exchange) -> None:
        origin = self._access.allow_origin(exchange)
        if origin is not None and self._access.is_preflight(exchange):
            await self._access.answer_preflight(exchange)
            return
        self._access.check(exchange)
        handler = _find_handler(exchange)
        await handler(self.state, exchange)

    async def _answer_error(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, _COUNTED) and exchange.path in _ADMITTING:
            self.state.rejections[error_kind(error).code or "other"] += 1
        expected = isinstance(error, OctavoError | InvalidParameterError)
        if not expected:
            logger.error("request %s failed", exchange.request_id, exc_info=error)
        elif isinstance(error, BadRequestError) and error.__cause__ is not None:
            # A template that meets data it was not written for may need its operator's eye.
            logger.warning("request %s: %s: %r", exchange.request_id, error, error.__cause__)
        if exchange.status is None:
            await exchange.respond_error(error)
        elif not expected:
            raise error


def _find_handler(exchange: Exchange) -> Handler:
    """The route's handler. HEAD is GET; the protocol leaves the body out.

    Raises:
        RouteNotFoundError, MethodNotAllowedError.
    """
    methods = ROUTES.get(exchange.path)
    if methods is None:
        for prefix, candidates in PREFIX_ROUTES.items():
            if exchange.path.startswith(prefix) and exchange.path != prefix:
                methods = candidates
    if methods is None:
        raise RouteNotFoundError(f"no route {exchange.method} {exchange.path[:200]}")
    method = "GET" if exchange.method == "HEAD" else exchange.method
    handler = methods.get(method)
    if handler is None:
        raise MethodNotAllowedError(
            f"{exchange.method[:20]} is not allowed here", ", ".join(methods)
        )
    return handler
