"""Four turns of calls and results, by families: no turn's reasoning or calls leak into another's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import StartServer
from test_tools import MESSAGES, ask, joined, plain, start_family, stream

from families import FAMILIES, Family

pytestmark = pytest.mark.system


def check(family: Family, choice: dict[str, Any]) -> None:
    message = choice["message"]
    assert message["reasoning"].strip() == (family.thought or "")
    assert message["content"].strip() == family.content
    calls = [(call["name"], json.loads(call["arguments"])) for call in message["tool_calls"]]
    assert calls == list(family.calls)


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES if one.calls], ids=lambda family: family.template
)
def test_every_turn_is_taken_apart_as_the_first(start_server: StartServer, family: Family) -> None:
    server = start_family(start_server, family)
    messages: list[Any] = list(MESSAGES)
    seen: list[str] = []
    for _ in range(4):
        answer = ask(server, messages=messages)
        check(family, plain(answer))
        check(family, joined(stream(server, messages=messages)))
        message = answer["choices"][0]["message"]
        ids = [call["id"] for call in message["tool_calls"]]
        seen += ids
        # Kimi's models number their calls themselves, and this one knows no others.
        if family.tools != "kimi_k2":
            assert len(set(seen)) == len(seen)
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": one, "content": "12:00"} for one in ids]
