"""The ``tools`` and ``tool_choice`` of responses, as those of a chat template, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from octavo.errors import InvalidParameterError, clip
from octavo.server.http.fields import Check, invalid, json_objects
from octavo.server.work.flat_tools import flat_tools
from octavo.text.tools import MAX_TOOLS, ToolUse, parse_tool_use

# The one argument of a custom tool, which takes a text.
INPUT: Final = "input"

TOOLS: Final = Check(
    {
        "type": "array",
        "maxItems": MAX_TOOLS,
        "items": {
            "type": "object",
            "properties": {
                "type": {"type": "string"},
                "name": {"type": "string"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": {"type": ["boolean", "null"]},
                "format": {"type": ["object", "null"]},
                "tools": {"type": "array", "items": {"type": "object"}},
            },
            "required": ["type"],
        },
    },
    json_objects,
)


def _parse_choice(name: str, value: Any) -> Any:
    match value:
        case "none" | "auto" | "required" | {"type": str()}:
            return value
    raise invalid(name, "none, auto, required, or an object with a type", value)


TOOL_CHOICE: Final = Check(
    {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
        ]
    },
    _parse_choice,
)


@dataclass(frozen=True, slots=True)
class ToolOrigin:
    """The tool that a function stands for.

    Args:
        name: the client's.
        namespace: it belongs to, if any.
        grammar: (syntax, definition) of a custom tool's text, where it has one.
        is_custom: whether it takes a text, and no arguments by name.
    """

    name: str
    namespace: str | None = None
    grammar: tuple[str, str] | None = None
    is_custom: bool = False


@dataclass(slots=True)
class ResponseTools:
    """The tools of one request.

    Args:
        use: as functions, and how they may be used.
        origins: by a function's name, of those that are more than functions.
        skipped: types of tools that this server cannot offer.
    """

    use: ToolUse = ToolUse()
    origins: dict[str, ToolOrigin] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def origin(self, name: str) -> ToolOrigin:
        """The tool that a called function stands for."""
        return self.origins.get(name) or ToolOrigin(name)

    @property
    def forced_text(self) -> ToolOrigin | None:
        """The custom tool that must be called with a text of a grammar, if it is so.

        The answer then is that text and nothing else: its grammar could not be followed inside of
        a string of JSON.
        """
        if self.use.mode != "named":
            return None
        origin = self.origin(self.use.tools[0].name)
        return origin if origin.grammar is not None else None


def joined_name(namespace: str, name: str) -> str:
    """The name by which the model knows a function of a namespace."""
    return f"{namespace}.{name}"


def make_tools(tools: Sequence[Mapping[str, Any]], choice: Any, parallel: bool) -> ResponseTools:
    """The tools that this server can offer. Those of unknown types are skipped: clients send them
    to every server.

    Raises:
        InvalidParameterError: naming the field.
    """
    made = ResponseTools()
    functions: list[tuple[str, dict[str, Any]]] = []
    for place, namespace, tool in _all(tools):
        function, origin = _function(place, namespace, tool)
        if function is None:
            made.skipped.append(str(tool.get("type")))
            continue
        functions.append((place, function))
        if origin is not None:
            made.origins[function["name"]] = origin
    known = flat_tools(functions, {})
    made.use = parse_tool_use(known, _chat_choice(choice, bool(known)), parallel)
    return made


def _all(
    tools: Sequence[Mapping[str, Any]],
) -> Iterable[tuple[str, str | None, Mapping[str, Any]]]:
    """Every tool: its place in the body, its namespace, and the tool."""
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        inner = tool.get("tools")
        if tool.get("type") == "namespace" and isinstance(inner, list):
            namespace = tool.get("name")
            if not isinstance(namespace, str) or not namespace:
                raise invalid(f"{place}.name", "a string", namespace)
            for at, one in enumerate(json_objects(f"{place}.tools", inner)):
                yield f"{place}.tools[{at}]", namespace, one
        else:
            yield place, None, tool


def _function(
    place: str, namespace: str | None, tool: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, ToolOrigin | None]:
    """A tool as chat has functions, and what that stands for, if it is more."""
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        return None, None
    # As chat nests it, which some clients send here too.
    nested = tool.get("function")
    if isinstance(nested, Mapping):
        tool = {**nested, "type": kind}
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise invalid(f"{place}.name", "a string", name)
    full = name if namespace is None else joined_name(namespace, name)
    function: dict[str, Any] = {"name": full}
    if kind == "custom":
        grammar = _grammar(f"{place}.format", tool.get("format"))
        function |= _text_function(tool.get("description"), grammar)
        return function, ToolOrigin(name, namespace, grammar, is_custom=True)
    for key in ("description", "parameters", "strict"):
        if tool.get(key) is not None:
            function[key] = tool[key]
    return function, None if namespace is None else ToolOrigin(name, namespace)


def _grammar(place: str, value: Any) -> tuple[str, str] | None:
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "grammar", "syntax": "lark" | "regex" as syntax, "definition": str(text)}:
            return syntax, text
    raise InvalidParameterError(
        f"{place} must be of type text, or of type grammar with a definition in the syntax lark "
        "or regex",
        place,
    )


def _text_function(description: Any, grammar: tuple[str, str] | None) -> dict[str, Any]:
    texts = [description] if isinstance(description, str) else []
    schema: dict[str, Any] = {"type": "string"}
    if grammar is not None:
        syntax, definition = grammar
        texts.append(f"{INPUT} must follow this grammar ({syntax}):\n{definition}")
        if syntax == "regex":
            schema["pattern"] = f"^(?:{definition})$"
    parameters = {"type": "object", "properties": {INPUT: schema}, "required": [INPUT]}
    return {"description": "\n\n".join(texts), "parameters": parameters}


def _chat_choice(choice: Any, has_tools: bool) -> Any:
    """A tool_choice as chat has it.

    Raises:
        InvalidParameterError: it names what is not there.
    """
    match choice:
        case None | "auto":
            return "auto" if has_tools else None
        case "none" | "required":
            return choice
        case {"type": "function" | "custom", "name": str(name)}:
            return {"type": "function", "function": {"name": _full_name(choice, name)}}
        case {"type": "function", "function": {"name": str()}}:
            return choice
        case {"type": "allowed_tools", "tools": list(tools)}:
            # What is not a function has been skipped among the tools, too.
            allowed = [
                {"name": _full_name(one, one["name"])}
                for one in tools
                if isinstance(one, dict) and isinstance(one.get("name"), str)
            ]
            inner = {"mode": choice.get("mode", "auto"), "tools": allowed}
            return {"type": "allowed_tools", "allowed_tools": inner}
    kind = choice.get("type") if isinstance(choice, dict) else choice
    raise InvalidParameterError(
        f"tool_choice: a tool of type {clip(str(kind))} cannot be chosen here", "tool_choice"
    )


def _full_name(choice: Mapping[str, Any], name: str) -> str:
    namespace = choice.get("namespace")
    return joined_name(namespace, name) if isinstance(namespace, str) and namespace else name
