"""Anthropic's error object, and its words for a prompt that is too long."""

from __future__ import annotations

from typing import Any, Final

import orjson

from octavo.errors import (
    EngineDeadError,
    QueueFullError,
    RequestTooLongError,
    UnsupportedParameterError,
    error_kind,
)
from octavo.errors import error_message as message_of

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Anthropic's own status, which its clients back off at.
STATUSES: Final[dict[type[BaseException], int]] = {QueueFullError: 529}


def error_object(error: BaseException, request_id: str | None = None) -> dict[str, Any]:
    """``{"type": "error", "error": {"type", "message"}, "request_id"}``."""
    status = error_kind(error).status
    kind = "api_error" if status >= 500 else "invalid_request_error"
    if not isinstance(error, EngineDeadError):
        kind = _TYPES.get(status, kind)
    message = message_of(error, request_id)
    if isinstance(error, RequestTooLongError):
        # Clients match these words, and compact their conversation.
        most = min(error.max_model_len, error.num_prompt_tokens - 1)
        message = f"prompt is too long: {error.num_prompt_tokens} tokens > {most} maximum"
    inner: dict[str, Any] = {"type": kind, "message": message}
    if isinstance(error, UnsupportedParameterError) and error.param == "thread":
        # By these its client knows to send the whole conversation.
        inner["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": inner, "request_id": request_id}


def error_body(error: BaseException, request_id: str | None = None) -> bytes:
    """The object as an answer's body."""
    return orjson.dumps(error_object(error, request_id))
