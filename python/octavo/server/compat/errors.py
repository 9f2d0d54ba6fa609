"""The form of errors that Ollama and TGI share: one ``error`` text."""

from __future__ import annotations

import orjson

from octavo.errors import error_kind, error_message


def error_body(error: BaseException, request_id: str | None = None) -> bytes:
    """``{"error", "error_type"}``; the second is TGI's, and Ollama's clients do not look at it."""
    status = error_kind(error).status
    kind = "validation" if status < 500 else "overloaded" if status == 503 else "generation"
    return orjson.dumps({"error": error_message(error, request_id), "error_type": kind})
