"""The ``messages`` and ``system`` of Anthropic's requests as a conversation for a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http import limits
from octavo.server.http.fields import Check, invalid, json_object
from octavo.server.work.turns import NO_IMAGE

Message = dict[str, Any]

_ROLES: Final = ("user", "assistant", "system")
_BLOCKS: Final = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"type": "string"}},
                "required": ["type"],
            },
        },
    ]
}
_MESSAGES_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1,
    "maxItems": limits.MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": list(_ROLES)}, "content": _BLOCKS},
        "required": ["role", "content"],
    },
}


def _parse_system(name: str, value: Any) -> list[dict[str, str]]:
    """The system's texts as parts."""
    if isinstance(value, str):
        return [_part(value)] if value else []
    return [_part(_text_block(place, block)) for place, block in _listed(name, value)]


def _parse_messages(name: str, value: Any) -> list[Message]:
    """The conversation. Messages of one role in a row are one, as in Anthropic's interface."""
    if not isinstance(value, list) or not value:
        raise invalid(name, "a list of at least one message", value)
    limits.check_count(name, value, limits.MAX_MESSAGES, "messages")
    clean: list[Message] = []
    for index, message in enumerate(value):
        place = f"{name}.{index}"
        content = json_object(place, message).get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = list(_listed(f"{place}.content", content))
        match message.get("role"):
            case "user":
                clean += _user_messages(blocks)
            case "assistant":
                clean.append(_assistant_message(blocks))
            case "system":
                parts = [_part(_text_block(where, block)) for where, block in blocks]
                clean.append({"role": "system", "content": parts})
            case role:
                raise invalid(f"{place}.role", "one of " + ", ".join(_ROLES), role)
    return clean


SYSTEM: Final = Check(_BLOCKS, _parse_system)
MESSAGES: Final = Check(_MESSAGES_SCHEMA, _parse_messages)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _listed(name: str, value: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    """Every block of a list with its name in the body."""
    if not isinstance(value, list):
        raise invalid(name, "a string or a list of blocks", value)
    limits.check_count(name, value, limits.MAX_MESSAGES, "blocks")
    for index, block in enumerate(value):
        place = f"{name}.{index}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(place, "an object with a type", block)
        yield place, block


def _string(place: str, block: dict[str, Any], field: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise invalid(f"{place}.{field}", "a string", value)
    return value


def _text_block(place: str, block: dict[str, Any]) -> str:
    if block["type"] != "text":
        raise InvalidParameterError(f"{place}.type must be text here", f"{place}.type")
    return _string(place, block, "text")


# ------------------------------------------------------------------------ users' blocks


def _user_messages(blocks: list[tuple[str, dict[str, Any]]]) -> list[Message]:
    """Results of tools first, each a message of its own, then what the user writes."""
    results: list[Message] = []
    parts: list[dict[str, str]] = []
    for place, block in blocks:
        if block["type"] == "tool_result":
            results.append(_result(place, block))
        elif (text := _readable(place, block)) is not None:
            parts.append(_part(text))
    if parts or not results:
        results.append({"role": "user", "content": parts or [_part("")]})
    return results


def _readable(place: str, block: dict[str, Any]) -> str | None:
    """The text of a block that a user or a tool gives; None: the model has no use for it.

    Raises:
        UnsupportedParameterError: the block is an image, or a file of another kind.
    """
    match block["type"]:
        case "text":
            return _string(place, block, "text")
        case "document":
            return _document(place, block)
        case "search_result":
            texts = [
                _text_block(where, one)
                for where, one in _listed(f"{place}.content", block.get("content"))
            ]
            return "\n".join([str(block.get("title", "")), str(block.get("source", "")), *texts])
        case "image" | "container_upload" as kind:
            raise UnsupportedParameterError(
                f"{place}: {kind} blocks are not supported by this model, which reads text alone",
                f"{place}.type",
            )
    # What servers of tools leave in a history: there is nothing in it for this model.
    return None


def _document(place: str, block: dict[str, Any]) -> str:
    source = json_object(f"{place}.source", block.get("source"))
    match source.get("type"):
        case "text":
            text = _string(f"{place}.source", source, "data")
        case "content":
            content = source.get("content")
            if isinstance(content, str):
                text = content
            else:
                inner = _listed(f"{place}.source.content", content)
                text = "\n".join(_text_block(where, one) for where, one in inner)
        case kind:
            raise UnsupportedParameterError(
                f"{place}.source.type: documents of type {clip(str(kind))} are not supported, "
                "text is",
                f"{place}.source.type",
            )
    head = [block[key] for key in ("title", "context") if isinstance(block.get(key), str)]
    return "\n".join([*head, text])


def _result(place: str, block: dict[str, Any]) -> Message:
    content = block.get("content", "")
    if content is None or isinstance(content, str):
        text = content or ""
    else:
        inner = _listed(f"{place}.content", content)
        texts = (
            NO_IMAGE if one["type"] == "image" else _readable(where, one) for where, one in inner
        )
        text = "\n".join(one for one in texts if one is not None)
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _string(place, block, "tool_use_id"), "content": text}


# ------------------------------------------------------------------- assistants' blocks


def _assistant_message(blocks: list[tuple[str, dict[str, Any]]]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in blocks:
        match block["type"]:
            case "text":
                texts.append(_string(place, block, "text"))
            case "thinking":
                thoughts.append(_string(place, block, "thinking"))
            case "tool_use":
                calls.append(_call(place, block))
    message: Message = {"role": "assistant", "content": "\n".join(texts) if texts else None}
    if thoughts and (thought := "\n".join(filter(None, thoughts))):
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    return message


def _call(place: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid(f"{place}.input", "an object", arguments)
    try:
        # As clients of the chat interface send them; templates get the form they are written for.
        text = json.dumps(arguments, ensure_ascii=False)
    except RecursionError:
        raise InvalidParameterError(f"{place}.input nests too deeply", f"{place}.input") from None
    function = {"name": _string(place, block, "name"), "arguments": text}
    return {"id": _string(place, block, "id"), "type": "function", "function": function}
