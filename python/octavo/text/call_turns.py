"""call_turns: conversations with calls, in the forms that some templates insist on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def call_forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The conversation as it is, and if there are calls the forms that few templates insist on."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        named = _named_results(messages)
        yield named
        yield _single_calls(named)


def _named_results(messages: Sequence[Message]) -> list[Message]:
    """Results with the name of the function that was called: clients give its call's id alone."""
    names: dict[Any, Any] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call.get("id")] = call["function"].get("name")
        if message.get("role") == "tool" and not message.get("name"):
            name = names.get(message.get("tool_call_id"))
            message = message if name is None else {**message, "name": name}
        named.append(message)
    return named


def _single_calls(messages: Sequence[Message]) -> list[Message]:
    """One call a turn, each before its result, for templates that refuse several in one message."""
    single: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            single.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            # What was said and thought came before the first.
            turn = message if number == 0 else {"role": message.get("role"), "content": None}
            single.append({**turn, "tool_calls": [call]})
            own = [one for one in results if one.get("tool_call_id") == call.get("id")]
            single += own
            results = [one for one in results if one not in own]
        single += results
    return single
