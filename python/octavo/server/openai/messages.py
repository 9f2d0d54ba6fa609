"""The ``messages`` of a chat request: checked shapes, ready for a chat template."""

from __future__ import annotations

from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.server.http import limits
from octavo.server.http.fields import invalid

# Roles whose messages are nothing without content. A template may know others: any name is one.
_ROLES_OF_CONTENT: Final = ("system", "developer", "user", "tool")

# Strings that a template may read; null is absence.
_TEXT_FIELDS: Final = ("name", "tool_call_id", "reasoning", "reasoning_content")

# Part type -> the part's field that holds the text.
_TEXT_PARTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_PART: Final = {
    "anyOf": [
        {"type": "string"},
        *(
            {
                "type": "object",
                "properties": {"type": {"const": kind}, field: {"type": "string"}},
                "required": ["type", field],
            }
            for kind, field in _TEXT_PARTS.items()
        ),
    ]
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
        # Whatever else clients keep in their histories is ignored, as in vLLM.
        "additionalProperties": True,
        "properties": {
            "role": {"type": "string", "minLength": 1},
            "content": {
                "anyOf": [
                    {"type": ["string", "null"]},
                    {"type": "array", "items": _PART},
                ]
            },
            **{name: {"type": ["string", "null"]} for name in _TEXT_FIELDS},
            "tool_calls": {"type": ["array", "null"], "items": _TOOL_CALL},
        },
    },
}


def parse_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Check a conversation.

    Returns:
        New dicts with ``role``, ``content`` (text, text parts or None) and the other fields that
        templates read. Fields of any other name are left out, as in vLLM.

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
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role", "a string such as user", role)
    clean: dict[str, Any] = {"role": role, "content": _content(where, message)}
    for key in _TEXT_FIELDS:
        value = message.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise invalid(f"{where}.{key}", "a string", value)
            clean[key] = value
    if calls := message.get("tool_calls"):
        clean["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    # The older form of a call, for templates that read it.
    if isinstance(call := message.get("function_call"), dict):
        clean["function_call"] = call
    return clean


def _content(where: str, message: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """A message's text, or its text parts."""
    content = message.get("content")
    field = f"{where}.content"
    if isinstance(content, str):
        return content
    if content is None:
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal:
            # OpenAI's models put what they said in place of an answer there.
            return refusal
        # A call of tools needs no text, nor does a message that only carries reasoning.
        if message["role"] not in _ROLES_OF_CONTENT:
            return None
        raise InvalidParameterError(f"{field} is missing", field)
    if not isinstance(content, list):
        raise invalid(field, "a string or a list of parts", content)
    return [
        {"type": "text", "text": _part(f"{field}[{index}]", part)}
        for index, part in enumerate(content)
    ]


def _part(place: str, part: Any) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise invalid(place, "an object", part)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise UnsupportedParameterError(
            f"{place}.type: only text parts are supported by this model", f"{place}.type"
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise invalid(f"{place}.{_TEXT_PARTS[kind]}", "a string", text)
    return text


def _tool_calls(field: str, value: Any) -> list[dict[str, Any]]:
    """Calls with all that templates read of them: a type, and arguments."""
    if not isinstance(value, list):
        raise invalid(field, "a list of tool calls", value)
    calls = []
    for index, call in enumerate(value):
        place = f"{field}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(place, "an object with function.name", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str | dict | None):
            raise invalid(f"{place}.function.arguments", "JSON text", arguments)
        arguments = "{}" if arguments is None else arguments
        calls.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return calls
