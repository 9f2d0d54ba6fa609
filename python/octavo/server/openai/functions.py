"""functions: chat's older form of tools, ``functions`` and ``function_call``, as tools.

A message then holds one call at most, without an id, under ``function_call``; its result is a
message of the role ``function`` that names the function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from octavo.errors import InvalidParameterError, clip
from octavo.server.http import fields
from octavo.server.work.flat_tools import flat_tools
from octavo.text.tools import (
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    Tool,
    ToolUse,
    parse_tool_use,
)

_NAME: Final = {"type": "string", "minLength": 1, "maxLength": MAX_TOOL_NAME_CHARS}


@fields.check(
    type="array",
    maxItems=MAX_TOOLS,
    items={
        "type": "object",
        "properties": {
            "name": _NAME,
            "description": {"type": ["string", "null"]},
            "parameters": {"type": ["object", "null"]},
        },
        "required": ["name"],
    },
)
def parse_functions(name: str, value: Any) -> tuple[Tool, ...]:
    """Check ``functions``."""
    if not isinstance(value, list):
        raise fields.invalid(name, "a list of functions", value)
    try:
        return flat_tools([(f"{name}[{index}]", one) for index, one in enumerate(value)], {})
    except InvalidParameterError as error:
        if error.param != "tools":
            raise
        # Of all of them together: they are too many, or too long.
        raise InvalidParameterError(str(error).replace("tools", name), name) from None


@fields.check(
    anyOf=[
        {"enum": ["none", "auto"]},
        {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
    ]
)
def parse_function_call(name: str, value: Any) -> Any:
    """Check the shape of ``function_call``; ``function_use`` checks its name."""
    match value:
        case "none" | "auto" | {"name": str()}:
            return value
    raise fields.invalid(name, "none, auto, or an object that names a function", value)


def function_use(functions: Sequence[Tool], choice: Any) -> ToolUse:
    """The tools of such a request, of which an answer calls one.

    Raises:
        InvalidParameterError: ``function_call`` names none of them.
    """
    if isinstance(choice, dict):
        name = choice["name"]
        if all(function.name != name for function in functions):
            raise InvalidParameterError(
                f"function_call.name: there is no function {clip(name)}", "function_call.name"
            )
        choice = {"type": "function", "function": {"name": name}}
    return parse_tool_use(functions, choice, parallel=False)


def has_function_results(messages: list[dict[str, Any]]) -> bool:
    """True if a conversation holds older calls and their results: it may go on without functions.

    Either alone is left to the template.
    """
    has_result = any(message["role"] == "function" for message in messages)
    return has_result and any("function_call" in message for message in messages)


def as_tool_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with older calls and their results as calls of tools, which templates know.

    The ids that these need are nine digits, which every template takes.
    """
    found = []
    call_id = "0" * 9
    for number, message in enumerate(messages):
        call = message.get("function_call")
        if message["role"] == "function":
            message = {**message, "role": "tool", "tool_call_id": call_id}
        elif call is not None and "tool_calls" not in message:
            call_id = f"{number:09d}"
            function = {"name": str(call.get("name", "")), "arguments": call.get("arguments", "{}")}
            one = {"id": call_id, "type": "function", "function": function}
            message = {key: value for key, value in message.items() if key != "function_call"}
            message["tool_calls"] = [one]
        found.append(message)
    return found


def older_deltas(deltas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Deltas of a stream, the first call in the older form, which has no place for others."""
    found = []
    for delta in deltas:
        match delta:
            case {"tool_calls": [{"index": 0, "function": function}]}:
                found.append({"function_call": function})
            case {"content": _} | {"reasoning": _}:
                found.append(delta)
    return found


def older_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message's fields, its call in the older form."""
    calls = message.pop("tool_calls")
    return {**message, "function_call": calls[0]["function"]} if calls else message
