"""Errors, and one table of how each is answered: exception -> status, type, code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

# Of a name or value that came with a request, as messages quote it.
MAX_QUOTED_CHARS: Final = 100


def clip(text: str, most: int = MAX_QUOTED_CHARS) -> str:
    """At most so many characters of a text; dots stand for the rest."""
    return text if len(text) <= most else text[: most - 3] + "..."


class OctavoError(Exception):
    """Base of the errors octavo raises on purpose.

    The message is meant for the client: it carries no path, address or traceback. ``param`` names
    the request field at fault, None if there is none.
    """

    param: str | None = None


class InvalidRequestError(OctavoError, ValueError):
    """A request that can never be answered as it stands; the client has to change it."""


class InvalidParameterError(InvalidRequestError):
    """A request's value is out of range. ``param`` names the field, as OpenAI's errors do."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ModelLoadError(OctavoError, ValueError):
    """The model cannot be loaded.

    The message is one line that names the file and what is wrong: it is for whoever starts the
    server and goes into no answer.
    """


class QueueFullError(OctavoError):
    """As many requests, or tokens of their prompts, are there as may; try again later."""

    def __init__(self, there: str) -> None:
        super().__init__(f"the server is overloaded: {there}")


class PausedError(OctavoError):
    """Generation is paused by whoever runs the engine."""

    def __init__(self) -> None:
        super().__init__("generation is paused: try again once it goes on")


class RequestTooLongError(InvalidRequestError):
    """The prompt leaves no room for a token in the model's context.

    ``at_least``: the prompt was not counted to its end.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        max_model_len: int,
        param: str | None = None,
        *,
        at_least: bool = False,
    ) -> None:
        count = f"at least {num_prompt_tokens}" if at_least else str(num_prompt_tokens)
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt holds "
            f"{count} tokens. Please reduce the length of the input prompt."
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len
        self.param = param


class UnsupportedParameterError(InvalidRequestError):
    """A field octavo knows of but does not implement, or does not know at all."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class BadRequestError(InvalidRequestError):
    """A request that cannot be understood: its JSON, its shape, its chat template."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContradictionError(InvalidRequestError):
    """A request whose settings leave its text no next token: found where the text comes to it."""


class AuthenticationError(OctavoError):
    """No API key, or a wrong one."""


class ForbiddenHostError(OctavoError):
    """A Host header that does not name this loopback server (a DNS rebinding attack's mark)."""


class ModelNotFoundError(OctavoError):
    """The request names a model this server does not serve."""

    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {clip(model)!r} does not exist.")


class ResponseNotFoundError(OctavoError):
    """No stored response has the id, or none that the client's key may see.

    ``param``: the request's field that holds the id; None: its path does.
    """

    def __init__(self, response_id: str, param: str | None = None) -> None:
        super().__init__(f"Response with id {clip(response_id)!r} not found.")
        self.param = param


class UpgradeRefusedError(OctavoError):
    """A client asks for a WebSocket. By this answer it knows to use plain HTTP."""

    def __init__(self) -> None:
        super().__init__("responses are streamed over HTTP here: send POST with stream")


class RouteNotFoundError(OctavoError):
    """No such path."""


class MethodNotAllowedError(OctavoError):
    """The path exists, the method does not. ``allowed`` goes into the Allow header."""

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class RequestTimeoutError(OctavoError):
    """The client stopped sending in the middle of its request."""


class BodyTooLargeError(OctavoError):
    """The request's body is over the limit."""


class ContentTypeError(OctavoError):
    """The body is not declared to be JSON."""


class TransferCodingError(OctavoError):
    """The body is coded in a way the server does not know."""


class ContentCodingError(OctavoError):
    """The body is compressed in a way that is not decoded here."""


class HeaderTooLargeError(OctavoError):
    """The request's head is over the limit."""


class LoadingError(OctavoError):
    """The model is not loaded yet."""

    def __init__(self) -> None:
        super().__init__("the model is loading")


class DrainingError(OctavoError):
    """The server is shutting down and takes no new work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class StalledError(OctavoError):
    """The engine has work and makes no progress."""

    def __init__(self) -> None:
        super().__init__("the engine makes no progress")


class EngineDeadError(OctavoError):
    """The engine steps no more: it was stopped, or a fatal error ended it."""

    def __init__(
        self, message: str = "the engine has stopped because of an internal error"
    ) -> None:
        super().__init__(message)


class ReplicaLostError(OctavoError):
    """The copy of the model that had the request is gone; others go on, or come back."""

    def __init__(self) -> None:
        super().__init__("the replica that had this request is gone; send it again")


class GenerationError(OctavoError):
    """The engine failed on this request; others go on."""

    def __init__(self) -> None:
        super().__init__("the engine failed on this request")


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """The HTTP answer to one class of exceptions."""

    status: int
    type: str
    code: str | None
    headers: dict[str, str] = field(default_factory=dict)


_INVALID = "invalid_request_error"
# A queue of thousands empties in seconds; a client that waits one second finds out soon enough.
_RETRY = {"Retry-After": "1"}
_RETRY_LATER = {"Retry-After": "5"}

# Looked up along the exception's MRO, so that subclasses inherit their base's answer.
ERROR_TABLE: dict[type[BaseException], ErrorKind] = {
    InvalidRequestError: ErrorKind(400, _INVALID, None),
    InvalidParameterError: ErrorKind(400, _INVALID, "invalid_value"),
    RequestTooLongError: ErrorKind(400, _INVALID, "context_length_exceeded"),
    UnsupportedParameterError: ErrorKind(400, _INVALID, "unsupported_parameter"),
    BadRequestError: ErrorKind(400, _INVALID, None),
    ContradictionError: ErrorKind(400, _INVALID, "contradiction"),
    AuthenticationError: ErrorKind(
        401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
    ),
    ForbiddenHostError: ErrorKind(403, _INVALID, "forbidden_host"),
    ModelNotFoundError: ErrorKind(404, _INVALID, "model_not_found"),
    ResponseNotFoundError: ErrorKind(404, _INVALID, "not_found"),
    RouteNotFoundError: ErrorKind(404, _INVALID, "not_found"),
    MethodNotAllowedError: ErrorKind(405, _INVALID, "method_not_allowed"),
    RequestTimeoutError: ErrorKind(408, _INVALID, "request_timeout", {"Connection": "close"}),
    BodyTooLargeError: ErrorKind(413, _INVALID, "body_too_large"),
    ContentTypeError: ErrorKind(415, _INVALID, "unsupported_content_type"),
    ContentCodingError: ErrorKind(
        415, _INVALID, "unsupported_content_encoding", {"Accept-Encoding": "gzip, deflate"}
    ),
    UpgradeRefusedError: ErrorKind(
        426, _INVALID, "upgrade_refused", {"Connection": "close", "Upgrade": "HTTP/1.1"}
    ),
    HeaderTooLargeError: ErrorKind(431, _INVALID, "header_too_large", {"Connection": "close"}),
    TransferCodingError: ErrorKind(
        501, _INVALID, "unsupported_transfer_coding", {"Connection": "close"}
    ),
    QueueFullError: ErrorKind(503, "service_unavailable", "queue_full", _RETRY),
    PausedError: ErrorKind(503, "service_unavailable", "paused", _RETRY),
    LoadingError: ErrorKind(503, "service_unavailable", "loading", _RETRY),
    DrainingError: ErrorKind(503, "service_unavailable", "draining", _RETRY_LATER),
    StalledError: ErrorKind(503, "service_unavailable", "stalled", _RETRY_LATER),
    EngineDeadError: ErrorKind(503, "server_error", "engine_dead", _RETRY_LATER),
    ReplicaLostError: ErrorKind(503, "server_error", "replica_lost", _RETRY),
    GenerationError: ErrorKind(500, "server_error", "generation_failed"),
    Exception: ErrorKind(500, "server_error", "internal_error"),
}


def error_kind(error: BaseException) -> ErrorKind:
    """The table's row for an exception: its own or its nearest base's."""
    for cls in type(error).__mro__:
        if (kind := ERROR_TABLE.get(cls)) is not None:
            return kind
    return ERROR_TABLE[Exception]


# A message may quote the client's own values: enough of them to find the mistake, never all.
MAX_MESSAGE_CHARS = 1024


def error_message(error: BaseException, request_id: str | None = None) -> str:
    """The message for a client. An unforeseen exception's own text stays inside the server.

    ``request_id`` is named in a 500's message, so that its log entry can be found.
    """
    kind = error_kind(error)
    message = "internal error" if kind is ERROR_TABLE[Exception] else str(error)
    if kind.status == 500 and request_id is not None:
        message = f"{message} (request id {request_id})"
    return clip(message, MAX_MESSAGE_CHARS)
