"""Tools for a chat template that knows none: described in the system text, called in tags.

The format is that of Hermes' models, which most small models have met: a call is JSON between
``<tool_call>`` and ``</tool_call>``. Earlier calls and their results become text of the same form,
so that any model with a chat template can be driven by tools. A template that writes calls, but
describes no tools, goes on to write them in its own form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

# Name of the parser that reads what this text asks for.
FORMAT: Final = "hermes"

_HEAD: Final = (
    "You can call functions. These are the functions, one a line, each with a JSON schema of its "
    "arguments:"
)
_HOW: Final = """\
To call a function, write a JSON object with its name and its arguments between tags, one pair of \
tags for each call:
<tool_call>
{"name": "function name", "arguments": {"argument name": "value"}}
</tool_call>
The results come back between <tool_response> tags. If no function is of use, answer in plain \
text."""

Message = Mapping[str, Any]


def tool_text(tools: Sequence[Mapping[str, Any]], *, explains_calls: bool) -> str:
    """The description of tools for a system text.

    ``explains_calls``: whether the model has to be told how to call one.
    """
    lines = (_json(tool.get("function", tool)) for tool in tools)
    return "\n".join([_HEAD, *lines, *([_HOW] if explains_calls else [])])


def plain_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with calls and results as text. Results in a row are one user's message."""
    plain: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        clean = {key: message[key] for key in message if key not in ("tool_calls", "tool_call_id")}
        if is_result:
            text = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if follows_result:
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text})
        else:
            if calls := message.get("tool_calls"):
                text = _text(message.get("content"))
                parts = [text] if text else []
                clean["content"] = "\n".join([*parts, *map(_call, calls)])
            plain.append(clean)
        follows_result = is_result
    return plain


def with_system_text(messages: Sequence[Message], text: str) -> list[dict[str, Any]]:
    """The messages with ``text`` at the end of the system's message, or as one."""
    return _prepend(messages, text, ("system", "developer")) or [
        {"role": "system", "content": text},
        *map(dict, messages),
    ]


def with_user_text(messages: Sequence[Message], text: str) -> list[dict[str, Any]]:
    """The messages with ``text`` in the first one, for a template that has no system message."""
    joined = _prepend(messages, text, ("user",))
    return joined or [{"role": "user", "content": text}, *map(dict, messages)]


def _prepend(messages: Sequence[Message], text: str, roles: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with ``text`` joined to the first one, if it has one of the roles."""
    if not messages or messages[0].get("role") not in roles:
        return []
    first, *rest = map(dict, messages)
    own = _text(first.get("content"))
    texts = [text, own] if first["role"] == "user" else [own, text]
    first["content"] = "\n\n".join(filter(None, texts))
    return [first, *rest]


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function") or {}
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        arguments = _json(arguments)
    name = _json(function.get("name"))
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or ())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
