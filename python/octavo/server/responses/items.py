"""Items: the ``input`` of a response, checked, and as messages for a chat template."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http import limits
from octavo.server.http.fields import Check, invalid
from octavo.server.responses.tools import INPUT, joined_name
from octavo.server.work.turns import NO_IMAGE

Item = dict[str, Any]

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXT_PARTS: Final = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "summary_text": "text",
}
# Beginnings of the ids that the server gives to items without one.
_ID_PREFIXES: Final = {
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "reasoning": "rs",
}
# Before the text in ``encrypted_content``, by which the server knows its own.
_SEAL: Final = b"octavo:"

INPUT_CHECK: Final = Check(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "maxItems": limits.MAX_MESSAGES, "items": {"type": "object"}},
        ]
    },
    lambda name, value: _parse_input(name, value),
)


def _parse_input(name: str, value: Any) -> list[Item]:
    """The items, each with a type and an id. Their contents are checked as they are used."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise invalid(name, "a string or a list of items", value)
    limits.check_count(name, value, limits.MAX_MESSAGES, "items")
    items = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise invalid(place, "an object", item)
        kind = item.get("type", "message" if "role" in item else None)
        if not isinstance(kind, str):
            raise invalid(f"{place}.type", "a string such as message", kind)
        item = {**item, "type": kind}
        if not isinstance(item.get("id"), str):
            item["id"] = new_id(kind)
        items.append(item)
    return items


def new_id(kind: str) -> str:
    """A new id for an item."""
    return f"{_ID_PREFIXES.get(kind, 'item')}_{secrets.token_hex(20)}"


def seal(text: str) -> str:
    """Reasoning as ``encrypted_content``: opaque to clients, which send it back unread."""
    return base64.b64encode(_SEAL + text.encode()).decode()


def _unseal(content: Any) -> str:
    """The reasoning that ``seal`` was given; empty for what another server has written."""
    try:
        data = base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return ""
    return data.removeprefix(_SEAL).decode("utf-8", "replace") if data.startswith(_SEAL) else ""


def as_messages(
    items: Sequence[Item], skipped: list[str], name: str = "input"
) -> list[Item | None]:
    """A message for each item; those of one turn are still apart.

    Args:
        skipped: gets the types of items that the model has no use for, which become None.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    messages: list[Item | None] = []
    for index, item in enumerate(items):
        message = _message(f"{name}[{index}]", item)
        if message is None:
            skipped.append(item["type"])
        messages.append(message)
    return messages


def _message(place: str, item: Item) -> Item | None:
    match item["type"]:
        case "message":
            return _plain_message(place, item)
        case "function_call":
            return _call(place, item, _string(place, item, "arguments"))
        case "custom_tool_call":
            # A custom tool is a function of one text.
            return _call(place, item, orjson.dumps({INPUT: _string(place, item, "input")}).decode())
        case "function_call_output" | "custom_tool_call_output":
            return {
                "role": "tool",
                "tool_call_id": _string(place, item, "call_id"),
                "content": _output(f"{place}.output", item.get("output")),
            }
        case "reasoning":
            text = _reasoning(place, item)
            return {"role": "assistant", "content": None, "reasoning_content": text}
    return None


def _string(place: str, item: Item, field: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise invalid(f"{place}.{field}", "a string", value)
    return value


def _plain_message(place: str, item: Item) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise invalid(f"{place}.role", "one of " + ", ".join(_ROLES), role)
    content = item.get("content")
    if isinstance(content, str):
        texts = [content]
    else:
        parts = _parts(f"{place}.content", content)
        texts = [_part(where, part) for where, part in parts]
    if role == "assistant":
        return {"role": role, "content": "\n".join(texts)}
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


def _parts(place: str, content: Any) -> Iterable[tuple[str, Item]]:
    if not isinstance(content, list):
        raise invalid(place, "a string or a list of parts", content)
    limits.check_count(place, content, limits.MAX_MESSAGES, "parts")
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise invalid(f"{place}[{index}]", "an object", part)
        yield f"{place}[{index}]", part


def _part(place: str, part: Item) -> str:
    kind = part.get("type")
    if isinstance(kind, str) and (field := _TEXT_PARTS.get(kind)):
        return _string(place, part, field)
    raise UnsupportedParameterError(
        f"{place}: {clip(str(kind))} parts are not supported by this model, which reads text alone",
        f"{place}.type",
    )


def _output(place: str, output: Any) -> str:
    if isinstance(output, str):
        return output
    texts = (
        NO_IMAGE if part.get("type") == "input_image" else _part(where, part)
        for where, part in _parts(place, output)
    )
    return "\n".join(texts)


def _call(place: str, item: Item, arguments: str) -> Item:
    name = _string(place, item, "name")
    namespace = item.get("namespace")
    if isinstance(namespace, str) and namespace:
        name = joined_name(namespace, name)
    call = {
        "id": _string(place, item, "call_id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments or "{}"},
    }
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _reasoning(place: str, item: Item) -> str:
    """The model's reasoning, by the fullest account that the client has kept."""
    for field in ("content", "encrypted_content", "summary"):
        value = item.get(field)
        if field == "encrypted_content":
            text = _unseal(value)
        else:
            text = "\n".join(_part(w, p) for w, p in _parts(f"{place}.{field}", value or []))
        if text:
            return text
    return ""


def oldest_first_cuts(items: Sequence[Item]) -> list[int]:
    """Places at which a conversation may begin, the earliest first; never between call and output.

    0 is one of them: nothing is dropped. The last turn always stays.
    """
    cuts = [0]
    for index in range(1, len(items)):
        is_user = items[index].get("role") == "user"
        follows_output = items[index - 1]["type"].endswith("_output")
        if is_user or (follows_output and not items[index]["type"].endswith("_output")):
            cuts.append(index)
    return cuts


def check_references(items: Sequence[Item], found: dict[str, Item]) -> list[Item]:
    """The items with references replaced by what they name.

    Raises:
        InvalidParameterError: an item of that id is not there.
    """
    resolved = []
    for index, item in enumerate(items):
        if item["type"] == "item_reference":
            kept = found.get(item["id"])
            if kept is None:
                place = f"input[{index}].id"
                raise InvalidParameterError(
                    f"{place}: Item with id {clip(item['id'])!r} not found.", place
                )
            item = kept
        resolved.append(item)
    return resolved
