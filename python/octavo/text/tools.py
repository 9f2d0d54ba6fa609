"""Tool: a function that the model may call, and ToolUse: the tools of one request.

The shapes are those of OpenAI's chat interface: ``{"type": "function", "function": {"name",
"description", "parameters", "strict"}}``. ``LLM.chat`` and the server check them alike.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip

# Agents with many servers of tools bring hundreds; all of them are in the prompt.
MAX_TOOLS: Final = 1024
MAX_TOOL_NAME_CHARS: Final = 256
# Of one tool's parameters as JSON. A grammar's compiler takes as much.
MAX_SCHEMA_CHARS: Final = 256 * 1024
# Of all tools of a request. A prompt of that many characters fits few contexts.
MAX_TOOLS_CHARS: Final = 4 * 1024 * 1024

# The parameters of a function that takes none; templates iterate over ``properties``.
_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}}

Mode = Literal["none", "auto", "required", "named"]

# Mistral's templates take ids of nine letters and digits, and no others.
_MISTRAL_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_ALPHANUMERIC: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Tool:
    """One function.

    Args:
        name: what the model calls it by.
        schema: its parameters' JSON schema, as JSON.
        strict: whether a call's arguments must fit the schema.
        definition: as a chat template gets it, without ``strict``.
    """

    name: str
    schema: str
    strict: bool
    definition: dict[str, Any]


def num_tool_calls(messages: Iterable[Mapping[str, Any]]) -> int:
    """Calls in a conversation."""
    return sum(len(one.get("tool_calls") or ()) for one in messages)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, and how they may be used.

    Args:
        tools: those that may be called, and that the prompt describes.
        mode: "none": no call; "auto": the model decides; "required": at least one call; "named":
            a call of the only tool.
        parallel: whether an answer may hold several calls.
    """

    tools: tuple[Tool, ...] = ()
    mode: Mode = "auto"
    parallel: bool = True

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as a chat template gets them."""
        return [tool.definition for tool in self.tools]

    @property
    def signatures(self) -> list[tuple[str, str]]:
        """(name, JSON schema) of each tool; of several with one name the first's."""
        schemas: dict[str, str] = {}
        for tool in self.tools:
            schemas.setdefault(tool.name, tool.schema)
        return list(schemas.items())

    @property
    def num_chars(self) -> int:
        """About how many characters a prompt needs for them."""
        descriptions = (tool.definition["function"].get("description", "") for tool in self.tools)
        return sum(len(tool.schema) for tool in self.tools) + sum(map(len, descriptions))


# Of most requests.
NO_TOOLS: Final = ToolUse()


def parse_tools(field: str, value: Any) -> tuple[Tool, ...]:
    """Check a list of tools.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field, as
            ``tools[2].function.name``.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidParameterError(f"{field} must be a list of tools", field)
    if len(value) > MAX_TOOLS:
        raise InvalidParameterError(
            f"{field} must have at most {MAX_TOOLS} tools, not {len(value)}", field
        )
    tools = tuple(_parse_tool(f"{field}[{index}]", one) for index, one in enumerate(value))
    if sum(len(tool.schema) for tool in tools) > MAX_TOOLS_CHARS:
        raise InvalidParameterError(
            f"{field} must have at most {MAX_TOOLS_CHARS} characters of parameters", field
        )
    return tools


def _parse_tool(field: str, value: Any) -> Tool:
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"{field} must be an object", field)
    if value.get("type") not in (None, "function"):
        raise UnsupportedParameterError(
            f"{field}.type: only tools of type function are supported", f"{field}.type"
        )
    function = value.get("function")
    place = f"{field}.function"
    if not isinstance(function, Mapping):
        raise InvalidParameterError(f"{place} must be an object", place)
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TOOL_NAME_CHARS:
        raise InvalidParameterError(
            f"{place}.name must be a string of 1 to {MAX_TOOL_NAME_CHARS} characters",
            f"{place}.name",
        )
    description = function.get("description")
    if not isinstance(description, str | None):
        raise InvalidParameterError(f"{place}.description must be a string", f"{place}.description")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidParameterError(f"{place}.strict must be true or false", f"{place}.strict")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise InvalidParameterError(f"{place}.parameters must be an object", f"{place}.parameters")
    parameters = dict(parameters or _NO_PARAMETERS)
    schema = _schema(f"{place}.parameters", parameters)
    # The order of keys that templates print, whatever the client's was.
    clean: dict[str, Any] = {"name": name}
    if description is not None:
        clean["description"] = description
    clean["parameters"] = parameters
    for key, found in function.items():
        # What is null is absent: to a template it would be a value.
        if key not in clean and key != "strict" and found is not None:
            clean[key] = found
    definition = {"type": "function", "function": clean}
    return Tool(name, schema, bool(strict), definition)


def _schema(field: str, parameters: dict[str, Any]) -> str:
    try:
        schema = json.dumps(parameters, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise InvalidParameterError(f"{field} cannot be written as JSON", field) from None
    if len(schema) > MAX_SCHEMA_CHARS:
        raise InvalidParameterError(
            f"{field} must have at most {MAX_SCHEMA_CHARS} characters", field
        )
    return schema


def parse_tool_use(tools: Sequence[Tool], choice: Any = None, parallel: bool = True) -> ToolUse:
    """Combine tools with a ``tool_choice``.

    Args:
        choice: "none", "auto", "required", ``{"type": "function", "function": {"name"}}``,
            ``{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}``, or None: "auto"
            where there are tools.
        parallel: whether an answer may hold several calls.

    Raises:
        InvalidParameterError: naming the field.
    """
    field = "tool_choice"
    known = {tool.name: tool for tool in reversed(tools)}
    used = tuple(tools)
    mode: Mode = "auto"
    match choice:
        case None:
            pass
        case "none" | "auto" | "required":
            mode = choice
        case {"type": "function", "function": {"name": str(name)}}:
            mode = "named"
            used = (_find(known, name, f"{field}.function.name"),)
        case {"type": "allowed_tools", "allowed_tools": {"tools": list(allowed)} as inner}:
            mode = inner.get("mode", "auto")
            place = f"{field}.allowed_tools"
            if mode not in ("auto", "required"):
                raise InvalidParameterError(
                    f"{place}.mode must be auto or required", f"{place}.mode"
                )
            names = [_allowed_name(f"{place}.tools[{i}]", one) for i, one in enumerate(allowed)]
            found = {_find(known, name, f"{place}.tools").name for name in names}
            if not found:
                raise InvalidParameterError(f"{place}.tools must not be empty", f"{place}.tools")
            used = tuple(tool for tool in tools if tool.name in found)
        case _:
            raise InvalidParameterError(
                f"{field} must be none, auto, required, or an object that names a function or "
                "allowed_tools",
                field,
            )
    if mode in ("required", "named") and not used:
        raise InvalidParameterError(f"{field} {mode} needs tools", field)
    return ToolUse(used, mode, parallel)


def _allowed_name(field: str, value: Any) -> str:
    match value:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise InvalidParameterError(f"{field} must name a function", field)


def _find(known: Mapping[str, Tool], name: str, field: str) -> Tool:
    tool = known.get(name)
    if tool is None:
        raise InvalidParameterError(f"{field}: there is no tool {clip(name)}", field)
    return tool


def call_id(tool_calls: str | None, name: str, number: int, given: str = "") -> str:
    """An id for a call.

    Args:
        tool_calls: the format's name: some templates take ids of one form only.
        name: the function's.
        number: of the call within the conversation, from 0.
        given: what the model has written for one, if anything.
    """
    match tool_calls:
        case "kimi_k2":
            return given or f"functions.{name}:{number}"
        case "mistral" | "mistral_array":
            if _MISTRAL_ID.fullmatch(given):
                return given
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
