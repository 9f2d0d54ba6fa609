"""OpenAI's error object: the form of errors on its routes, and on routes that no API claims."""

from __future__ import annotations

from typing import Any

import orjson

from octavo.errors import clip, error_kind, error_message


def error_object(error: BaseException, request_id: str | None = None) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = error_kind(error)
    param = getattr(error, "param", None)
    return {
        "error": {
            "message": error_message(error, request_id),
            "type": kind.type,
            "param": None if param is None else clip(param),
            "code": kind.code,
        }
    }


def error_body(error: BaseException, request_id: str | None = None) -> bytes:
    """The object as an answer's body."""
    return orjson.dumps(error_object(error, request_id))
