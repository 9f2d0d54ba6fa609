"""Turns: the messages of agents as chat templates take them.

Agents send what they have in pieces: several system texts, some of them late; an assistant's turn
as reasoning, texts and calls; results of tools in the order in which they came. Templates want one
system text at the start, and turns that alternate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

# In place of an image that a tool gave: it stays in the client's history, and refusing it would end
# the conversation for good.
NO_IMAGE: Final = "[an image, which this model cannot see]"

Message = dict[str, Any]


def as_turns(messages: Sequence[Message], *, takes_late_system: bool) -> list[Message]:
    """The messages as turns: what is of one role in a row is one message.

    A ``developer`` is a system. A system's text that comes after others is left where it is, as a
    user's where the template refuses it: at the start it would change a prefix that is cached.

    Args:
        messages: content is text, a list of text parts, or, of an assistant, None.
        takes_late_system: whether the template takes a system's message that is not the first.
    """
    turns: list[Message] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        if role == "system" and not takes_late_system and any(m["role"] != "system" for m in turns):
            role = "user"
        message = {**message, "role": role}
        if turns and turns[-1]["role"] == role and role != "tool":
            turns[-1] = _joined(turns[-1], message)
        else:
            turns.append(message)
    return _in_call_order(turns)


def _joined(first: Message, second: Message) -> Message:
    joined = {**first, "content": _joined_content(first["content"], second["content"])}
    thoughts = [one.get("reasoning_content") for one in (first, second)]
    if any(thoughts):
        joined["reasoning_content"] = "\n".join(filter(None, thoughts))
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _joined_content(first: Any, second: Any) -> Any:
    if isinstance(first, list) or isinstance(second, list):
        return [*_parts(first), *_parts(second)]
    if first and second:
        return f"{first}\n{second}"
    return first or second


def _parts(content: Any) -> list[dict[str, str]]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _in_call_order(turns: list[Message]) -> list[Message]:
    """The turns with the results of each message's calls in the order of the calls."""
    ordered: list[Message] = []
    places: dict[str, int] = {}
    results: list[Message] = []
    for turn in [*turns, None]:
        if turn is not None and turn["role"] == "tool":
            results.append(turn)
            continue
        # Of unknown calls last; the sort keeps the order of equals.
        results.sort(key=lambda one: places.get(one.get("tool_call_id", ""), len(places)))
        ordered += results
        results = []
        if turn is not None:
            ordered.append(turn)
            places = {call["id"]: at for at, call in enumerate(turn.get("tool_calls", ()))}
    return ordered
