"""The ``tools`` and ``tool_choice`` of Anthropic's requests as those of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from octavo.errors import InvalidParameterError
from octavo.server.http.fields import Check, invalid, json_objects
from octavo.server.work.flat_tools import flat_tools
from octavo.text.tools import MAX_TOOLS, ToolUse, parse_tool_use

# Tools whose schema Anthropic's models know and the client runs, by the beginning of their type.
_KNOWN: Final[dict[str, dict[str, Any]]] = {
    "bash_": {
        "description": "Run a command in a shell that keeps its state.",
        "input_schema": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "restart": {"type": "boolean"}},
        },
    },
    "text_editor_": {
        "description": "View, create and edit text files.",
        "input_schema": {
            "type": "object",
            "properties": {
                "command": {"enum": ["view", "create", "str_replace", "insert"]},
                "path": {"type": "string"},
                "file_text": {"type": "string"},
                "old_str": {"type": "string"},
                "new_str": {"type": "string"},
                "insert_line": {"type": "integer"},
                "insert_text": {"type": "string"},
                "view_range": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["command", "path"],
        },
    },
}

TOOLS: Final = Check(
    {
        "type": "array",
        "maxItems": MAX_TOOLS,
        "items": {
            "type": "object",
            "properties": {
                "type": {"type": ["string", "null"]},
                "name": {"type": "string"},
                "description": {"type": ["string", "null"]},
                "input_schema": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["name"],
        },
    },
    json_objects,
)
TOOL_CHOICE: Final = Check(
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["auto", "any", "tool", "none"]},
            "name": {"type": "string"},
            "disable_parallel_tool_use": {"type": "boolean"},
        },
        "required": ["type"],
    },
    lambda name, value: _choice(name, value),
)


def _choice(name: str, value: Any) -> dict[str, Any]:
    match value:
        case {"type": "auto" | "any" | "none"} | {"type": "tool", "name": str()}:
            return dict(value)
        case {"type": "tool"}:
            raise InvalidParameterError(f"{name}.name is missing", f"{name}.name")
    raise invalid(name, "an object whose type is auto, any, tool or none", value)


def make_tool_use(
    tools: Sequence[dict[str, Any]], choice: dict[str, Any] | None, skipped: list[str]
) -> ToolUse:
    """The tools that this server can offer, and how they may be used.

    Args:
        skipped: gets the types of those that it cannot: Anthropic's servers run them.

    Raises:
        InvalidParameterError: naming the field.
    """
    functions = []
    for index, tool in enumerate(tools):
        if (function := _function(tool)) is not None:
            functions.append((f"tools.{index}", function))
        else:
            skipped.append(str(tool.get("type")))
    known = flat_tools(functions, {"parameters": "input_schema"})
    choice = choice or {"type": "auto"}
    wanted: Any = {
        "auto": "auto" if known else None,
        "any": "required",
        "none": "none",
        "tool": {"type": "function", "function": {"name": choice.get("name")}},
    }[choice["type"]]
    return parse_tool_use(known, wanted, not choice.get("disable_parallel_tool_use"))


def _function(tool: dict[str, Any]) -> dict[str, Any] | None:
    kind = tool.get("type")
    known: dict[str, Any] = {}
    if isinstance(kind, str) and "input_schema" not in tool:
        known = next((_KNOWN[start] for start in _KNOWN if kind.startswith(start)), {})
    schema = tool.get("input_schema", known.get("input_schema"))
    if schema is None and kind not in (None, "custom"):
        return None
    function = {"name": tool.get("name"), "parameters": schema}
    if (description := tool.get("description", known.get("description"))) is not None:
        function["description"] = description
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return function
