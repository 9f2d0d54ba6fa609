"""The ``messages`` of a chat request: checked shapes, ready for a chat template."""

from __future__ import annotations

from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http import limits
from octavo.server.http.fields import invalid

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

# Strings that a template may read; null is absence.
_TEXT_FIELDS: Final = ("name", "tool_call_id", "reasoning", "reasoning_content")
# Fields of OpenAI's own answers, which clients play back: harmless while they are empty.
_EMPTY_FIELDS: Final = ("refusal", "annotations", "audio", "function_call")

_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TOOL_CALL: Final = {
    "type": "object",
    "properties": {
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": ["string", "object"]}},
            "required": ["name"],
        }
    },
    "required": ["function"],
}
MESSAGES_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1,
    "maxItems": limits.MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "anyOf": [
                    {"type": ["string", "null"]},
                    {"type": "array", "items": _TEXT_PART},
                ]
            },
            **{name: {"type": ["string", "null"]} for name in _TEXT_FIELDS},
            "tool_calls": {"type": ["array", "null"], "items": _TOOL_CALL},
            **{name: {"description": "Empty."} for name in _EMPTY_FIELDS},
        },
    },
}


def parse_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Check a conversation.

    Returns:
        New dicts with ``role``, ``content`` (text, text parts or None) and the message's other
        fields.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field, as ``messages[2].role``.
    """
    if not isinstance(value, list) or not value:
        raise invalid(name, "a list of at least one message", value)
    limits.check_count(name, value, limits.MAX_MESSAGES, "messages")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(where, "an object", message)
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", "one of " + ", ".join(ROLES), role)
    clean: dict[str, Any] = {"role": role, "content": _content(where, message)}
    for key, value in message.items():
        if key in clean or value is None:
            continue
        field = f"{where}.{clip(key)}"
        if key in _TEXT_FIELDS:
            if not isinstance(value, str):
                raise invalid(field, "a string", value)
            clean[key] = value
        elif key == "tool_calls":
            if value:
                clean[key] = _tool_calls(field, value)
        elif key not in _EMPTY_FIELDS or value:
            raise UnsupportedParameterError(f"{field} is not supported", field)
    return clean


def _content(where: str, message: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """A message's text, or its text parts."""
    content = message.get("content")
    field = f"{where}.content"
    if isinstance(content, str):
        return content
    if content is None:
        # A call of tools needs no text, nor does a message that only carries reasoning.
        if message["role"] == "assistant":
            return None
        raise InvalidParameterError(f"{field} is missing", field)
    if not isinstance(content, list):
        raise invalid(field, "a string or a list of parts", content)
    parts = []
    for index, part in enumerate(content):
        place = f"{field}[{index}]"
        if not isinstance(part, dict):
            raise invalid(place, "an object", part)
        if part.get("type") != "text":
            raise UnsupportedParameterError(
                f"{place}.type: only text parts are supported by this model", f"{place}.type"
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise invalid(f"{place}.text", "a string", text)
        parts.append({"type": "text", "text": text})
    return parts


def _tool_calls(field: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid(field, "a list of tool calls", value)
    for index, call in enumerate(value):
        place = f"{field}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(place, "an object with function.name", call)
        if not isinstance(function.get("arguments", ""), str | dict):
            raise invalid(f"{place}.function.arguments", "JSON text", function["arguments"])
    return value
