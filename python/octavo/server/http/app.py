"""App: the layers between a connection and a handler: id, CORS, errors, access, routing.

The layers are Starlette's where it has them, all of them plain ASGI. None wraps the stream of an
answer's body in anything but a call: tokens leave at the rate they come.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import (
    BadRequestError,
    MethodNotAllowedError,
    OctavoError,
    RouteNotFoundError,
    clip,
    error_kind,
)
from octavo.server.http import limits
from octavo.server.http.access import Access, route_path
from octavo.server.http.api_keys import ApiKeys
from octavo.server.http.config import ServerConfig
from octavo.server.http.exchange import JSON, header

logger = logging.getLogger("octavo.server")

_REQUEST_ID: Final = b"x-request-id"
_PREFLIGHT_AGE_S: Final = 600
MAX_LOGGED_CHARS: Final = 1000

# Ids are to differ, not to be secret: the kernel's random numbers cost 10 us each.
_ids: Final = random.Random()


# An error and the request's id as a body, in the form of an API.
ErrorBody = Callable[[BaseException, str | None], bytes]


AnswerError = Callable[[Scope, Exception], Response]


class ErrorForm(NamedTuple):
    """The form of an API's errors.

    ``statuses``: the API's own, by error, in place of those in errors.py. ``id_header``: the API's
    name for a header with the request's id.
    """

    body: ErrorBody
    statuses: Mapping[type[BaseException], int] = {}
    id_header: str | None = None


class ApiRoute(Route):
    """A route, and the form of the errors on it.

    ``statuses``, ``id_header``: see ErrorForm. ``other_form``: that of requests with a header, by
    its name, where two APIs share a path.
    """

    def __init__(
        self,
        path: str,
        endpoint: ASGIApp,
        methods: Sequence[str],
        error_body: ErrorBody,
        statuses: Mapping[type[BaseException], int] | None = None,
        id_header: str | None = None,
        other_form: tuple[bytes, ErrorForm] | None = None,
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.error_form = ErrorForm(error_body, statuses or {}, id_header)
        self._other_form = other_form

    def error_form_of(self, scope: Scope) -> ErrorForm:
        """The form of a request's errors."""
        if self._other_form is not None and header(scope, self._other_form[0]) is not None:
            return self._other_form[1]
        return self.error_form


class App:
    """The ASGI application.

    Args:
        routes: the most used first.
        config: the server's flags.
        error_body: the form of errors on paths without a route.
        keys: those that requests may bring.
    """

    def __init__(
        self,
        routes: Sequence[ApiRoute],
        config: ServerConfig,
        error_body: ErrorBody,
        keys: ApiKeys,
    ) -> None:
        self._routes = routes
        self._error_body = error_body
        self._root_path = config.root_path.rstrip("/")
        self._logs_requests = config.enable_log_requests
        # Neither headers to be added to every answer nor a status to be noted on its way.
        self._is_direct = not (self._logs_requests or config.allowed_origins)
        app: ASGIApp = Dispatch(routes)
        app = Access(app, config, keys)
        app = ErrorAnswers(app, self.answer_error)
        if config.allowed_origins:
            app = Cors(
                app,
                self.answer_error,
                allow_origins=config.allowed_origins,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                allow_credentials=config.allow_credentials,
                expose_headers=("x-request-id", "retry-after"),
                max_age=_PREFLIGHT_AGE_S,
            )
        self._app = app

    def error_body(self, path: str, error: BaseException, request_id: str | None) -> bytes:
        """An error's body in the form of the API that ``path`` belongs to."""
        route = self._route(path)
        form = self._error_body if route is None else route.error_form.body
        return form(error, request_id)

    def _route(self, path: str) -> ApiRoute | None:
        return next((route for route in self._routes if route.path_regex.match(path)), None)

    def answer_error(self, scope: Scope, error: Exception) -> Response:
        """An error's answer, by the table in errors.py."""
        request_id: str = scope["state"]["request_id"]
        if isinstance(error, HTTPException):
            error = _routing_error(scope, error)
        if not isinstance(error, OctavoError):
            logger.error("request %s failed", request_id, exc_info=error)
        elif isinstance(error, BadRequestError) and error.__cause__ is not None:
            # A template that meets data it was not written for may need its operator's eye.
            logger.warning("request %s: %r: %r", request_id, str(error), error.__cause__)
        kind = error_kind(error)
        route = self._route(route_path(scope))
        form = ErrorForm(self._error_body) if route is None else route.error_form_of(scope)
        status = form.statuses.get(type(error), kind.status)
        response = Response(form.body(error, request_id), status, kind.headers, JSON)
        if form.id_header is not None:
            response.headers[form.id_header] = request_id
        if isinstance(error, MethodNotAllowedError):
            response.headers["allow"] = error.allowed
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r} is not served")
        began = time.monotonic()
        request_id = _request_id(header(scope, _REQUEST_ID))
        id_header = (_REQUEST_ID, request_id.encode())
        # Without an answer: as proxies log a client that closed its connection.
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
        # Not uvicorn's to set: it would put the prefix before every path, one more where a proxy
        # has left it there. Starlette's routes and route_path() take it off where it is.
        scope["root_path"] = self._root_path
        await self._app(scope, receive, send_with_id)  # type: ignore[arg-type]
        if self._logs_requests:
            _log_request(scope, status, (time.monotonic() - began) * 1000, request_id)


class Dispatch:
    """Finds the route: fixed paths in a table, all others by Starlette."""

    def __init__(self, routes: Sequence[Route]) -> None:
        # A path with a slash too many is a mistake; a redirect would hide it from a POST's sender.
        self._router = Router(routes, redirect_slashes=False)
        self._fixed: dict[tuple[str, str], ASGIApp] = {
            (method, route.path): route.app
            for route in routes
            if not route.param_convertors
            for method in route.methods or ()
        }

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on.

        Raises:
            HTTPException: no such route, or not by this method.
        """
        app = self._fixed.get((scope["method"], route_path(scope)), self._router)
        return app(scope, receive, send)


class ErrorAnswers:
    """Turns what ``app`` raises into answers."""

    def __init__(self, app: ASGIApp, answer_error: AnswerError) -> None:
        self._app = app
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on.

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
            await self._answer_error(scope, error)(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, with refusals in the form of every other error."""

    def __init__(self, app: ASGIApp, answer_error: AnswerError, **options: Any) -> None:
        super().__init__(app, **options)
        self._answer_error = answer_error

    def preflight_response(self, request_headers: Headers) -> Response:
        """Leave for a page to call, or a refusal with its reason."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        error = BadRequestError(f"{bytes(response.body).decode()}; see --allowed-origins")
        return _Refusal(self._answer_error, error, response.headers["vary"])


class _Refusal(Response):
    """A refused preflight request. Its form is known when it is sent: the path's."""

    def __init__(self, answer_error: AnswerError, error: Exception, vary: str) -> None:
        super().__init__()
        self._answer_error = answer_error
        self._error = error
        self._vary = vary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._answer_error(scope, self._error)
        response.headers["vary"] = self._vary
        await response(scope, receive, send)


def _routing_error(scope: Scope, error: HTTPException) -> Exception:
    """Starlette's routing errors as the server's own."""
    method = clip(scope["method"])
    if error.status_code == 404:
        return RouteNotFoundError(f"no route {method} {clip(scope['path'])}")
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        return MethodNotAllowedError(f"{method} is not allowed here", ", ".join(allowed))
    return error


def _log_request(scope: Scope, status: int, duration_ms: float, request_id: str) -> None:
    fields = {
        "method": scope["method"],
        "path": logged_path(scope),
        "status": status,
        "duration_ms": round(duration_ms, 1),
        "request_id": request_id,
    }
    logger.info("%s %s %s %.1f ms %s", *fields.values(), extra={"fields": fields})


def logged_path(scope: Scope) -> str:
    """The path as the client sent it, percent signs and all: a decoded one may hold line feeds."""
    raw: bytes = scope["raw_path"]
    return clip(repr(raw)[2:-1], MAX_LOGGED_CHARS)


def _request_id(given: bytes | None) -> str:
    """The client's own id where it is fit to be a header again, else a new one."""
    if given and len(given) <= limits.MAX_REQUEST_ID_CHARS and given.isascii():
        text = given.decode("ascii")
        if text.isprintable():
            return text
    return f"{_ids.getrandbits(128):032x}"
