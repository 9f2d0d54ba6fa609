"""App: what every request passes on its way to a handler: id, CORS, errors, access, routing.

The layers are Starlette's where it has them, all of them plain ASGI. None wraps the stream of an
answer's body in anything but a call: tokens leave at the rate they come.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import (
    BadRequestError,
    MethodNotAllowedError,
    OctavoError,
    RouteNotFoundError,
    error_body,
    error_kind,
)
from octavo.server.http import limits
from octavo.server.http.access import Access, route_path
from octavo.server.http.exchange import JsonResponse, header
from octavo.server.routes import make_routes
from octavo.server.work.state import ServerState

logger = logging.getLogger("octavo.server")

_REQUEST_ID: Final = b"x-request-id"
_PREFLIGHT_AGE_S: Final = 600

# Ids are to differ, not to be secret: the kernel's random numbers cost 10 us each.
_ids: Final = random.Random()


class App:
    """The ASGI application over one ServerState."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._logs_requests = state.config.enable_log_requests
        # Neither headers to be added to every answer nor a status to be noted on its way.
        self._is_direct = not (self._logs_requests or state.config.allowed_origins)
        app: ASGIApp = Dispatch(state)
        app = Access(app, state.config)
        app = ErrorAnswers(app)
        if state.config.allowed_origins:
            app = Cors(
                app,
                allow_origins=state.config.allowed_origins,
                allow_methods=("GET", "POST"),
                # Keys travel in headers of the page's own making, clients add some of their own.
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after"),
                max_age=_PREFLIGHT_AGE_S,
            )
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r} is not served")
        began = time.monotonic()
        request_id = _request_id(header(scope, _REQUEST_ID))
        id_header = (_REQUEST_ID, request_id.encode())
        # Nobody was answered: what a proxy would log for a client that closed its connection.
        status = 499

        # Not a coroutine of its own: it is called for every chunk of a stream.
        def send_with_id(message: Message) -> object:
            if message["type"] == "http.response.start":
                nonlocal status
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            return send(message)

        # Starlette's routes answer unknown paths themselves unless they know of an application.
        scope["app"] = self
        scope.setdefault("state", {})["request_id"] = request_id
        scope["octavo.direct"] = self._is_direct
        await self._app(scope, receive, send_with_id)  # type: ignore[arg-type]
        if self._logs_requests:
            logger.info(
                "%s %s %s %.1f ms %s",
                scope["method"],
                scope["path"],
                status,
                (time.monotonic() - began) * 1000,
                request_id,
            )


class Dispatch:
    """Finds the route: those with a fixed path by a look into a table, all else by Starlette."""

    def __init__(self, state: ServerState) -> None:
        # A path with a slash too many is a mistake; a redirect would hide it from a POST's sender.
        routes = make_routes(state)
        self._router = Router(routes, redirect_slashes=False)
        self._fixed: dict[tuple[str, str], ASGIApp] = {
            (method, route.path): route.app
            for route in routes
            if not route.param_convertors
            for method in route.methods or ()
        }

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Hand on.

        Raises:
            HTTPException: no such route, or not by this method.
        """
        app = self._fixed.get((scope["method"], route_path(scope)), self._router)
        return app(scope, receive, send)


class ErrorAnswers:
    """Turns what ``app`` raises into answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on.

        Raises:
            RuntimeError: the answer had begun; the server closes the connection.
        """
        has_begun = False

        # As in App: not a coroutine.
        def watched_send(message: Message) -> object:
            nonlocal has_begun
            has_begun = True
            return send(message)

        try:
            await self._app(scope, receive, watched_send)  # type: ignore[arg-type]
        except Exception as error:
            cycle = scope.get("octavo.cycle")
            if has_begun or (cycle is not None and cycle.response_started):
                raise RuntimeError("an answer broke off") from error
            response = await _answer_error(Request(scope), error)
            await response(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, with refusals in the shape of every other error."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Give leave, or say why not."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = BadRequestError(f"{bytes(response.body).decode()}; see --allowed-origins")
        answer = JsonResponse(error_body(error), response.status_code)
        answer.headers["vary"] = response.headers["vary"]
        return answer


async def _answer_error(request: Request, error: Exception) -> Response:
    """The error's answer, by the table in errors.py."""
    request_id: str = request.scope["state"]["request_id"]
    if isinstance(error, HTTPException):
        error = _routing_error(request, error)
    if not isinstance(error, OctavoError):
        logger.error("request %s failed", request_id, exc_info=error)
    elif isinstance(error, BadRequestError) and error.__cause__ is not None:
        # A template that meets data it was not written for may need its operator's eye.
        logger.warning("request %s: %s: %r", request_id, error, error.__cause__)
    kind = error_kind(error)
    response = JsonResponse(error_body(error, request_id), kind.status, kind.headers)
    if isinstance(error, MethodNotAllowedError):
        response.headers["allow"] = error.allowed
    return response


def _routing_error(request: Request, error: HTTPException) -> Exception:
    """What Starlette's routes raise, in our own words."""
    method, path = request.method[:20], request.scope["path"][:200]
    if error.status_code == 404:
        return RouteNotFoundError(f"no route {method} {path}")
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        return MethodNotAllowedError(f"{method} is not allowed here", ", ".join(allowed))
    return error


def _request_id(given: bytes | None) -> str:
    """The client's own id where it is fit to be a header again, else a new one."""
    if given and len(given) <= limits.MAX_REQUEST_ID_CHARS and given.isascii():
        text = given.decode("ascii")
        if text.isprintable():
            return text
    return f"{_ids.getrandbits(128):032x}"
