"""functions and function_call: the older form of tools, by the openai package and on the wire."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from harness import RunningServer, StartServer
from scripted_engine import ScriptedEngine, call
from test_streams import CHAT

FUNCTIONS: list[Any] = [
    {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}},
            "required": ["zone"],
        },
    },
    {"name": "now"},
]
QUESTION = {"role": "user", "content": "What time is it?"}


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    turns = [call("clock", '{"zone": "Oslo"}'), "<think>\nHm.\n</think>\n\nIt is noon."]
    return start_server(ScriptedEngine(turns))


def ask(server: RunningServer, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=30)
    fields = {"functions": FUNCTIONS, "messages": [QUESTION], **fields}
    return client.chat.completions.create(model="alias", **fields)


def test_a_loop_of_one_call(server: RunningServer) -> None:
    [choice] = ask(server).choices
    assert choice.finish_reason == "function_call"
    made = choice.message.function_call
    assert (made.name, json.loads(made.arguments)) == ("clock", {"zone": "Oslo"})
    assert choice.message.content is None
    assert not choice.message.tool_calls
    assert '"name": "clock"' in server.engine.prompts[-1]
    history = [
        QUESTION,
        choice.message.model_dump(include={"role", "content", "function_call"}),
        {"role": "function", "name": "clock", "content": "12:00"},
    ]
    # A conversation goes on where no function may be called any more.
    for fields in ({}, {"functions": openai.NOT_GIVEN}):
        [last] = ask(server, messages=history, **fields).choices
        assert (last.finish_reason, last.message.content) == ("stop", "It is noon.")
        prompt = server.engine.prompts[-1]
        assert '{"name": "clock", "arguments": {"zone": "Oslo"}}' in prompt
        assert "<tool_response>\n12:00\n</tool_response>" in prompt


def test_a_stream_folds_to_the_whole_call(server: RunningServer) -> None:
    deltas = [chunk.choices[0] for chunk in ask(server, stream=True)]
    calls = [one.delta.function_call for one in deltas if one.delta.function_call]
    assert [one.name for one in calls] == ["clock"] + [None] * (len(calls) - 1)
    assert json.loads("".join(one.arguments for one in calls)) == {"zone": "Oslo"}
    assert not any(one.delta.tool_calls for one in deltas)
    assert deltas[-1].finish_reason == "function_call"


def test_one_call_at_most(start_server: StartServer) -> None:
    both = call("clock", '{"zone": "Oslo"}') + call("now", "{}").partition("</think>")[2]
    server = start_server(ScriptedEngine([both]))
    made = ask(server).choices[0].message.function_call
    assert (made.name, made.arguments) == ("clock", '{"zone": "Oslo"}')
    chunks = list(ask(server, stream=True))
    parts = [chunk.choices[0].delta.function_call for chunk in chunks]
    assert "".join(part.arguments for part in parts if part) == '{"zone": "Oslo"}'


@pytest.mark.parametrize(
    ("choice", "names"), [("auto", ["clock", "now"]), ({"name": "now"}, ["now"])]
)
def test_a_choice_is_that_of_a_tool(server: RunningServer, choice: Any, names: list[str]) -> None:
    ask(server, function_call=choice)
    grammar = server.engine.submitted[-1][1].structured_outputs.grammar
    assert [name for name in ("clock", "now") if name in grammar] == names


def test_none_calls_nothing(server: RunningServer) -> None:
    [choice] = ask(server, function_call="none").choices
    assert choice.message.function_call is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": "clock"}, "functions"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f", "parameters": 1}]}, "functions[0].parameters"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"name": "x"}}, "function_call.name"),
        ({"functions": FUNCTIONS, "tools": [{"function": FUNCTIONS[0]}]}, "functions"),
    ],
)
def test_a_bad_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post(CHAT, {"messages": [QUESTION], **fields})
    assert answer.status == 400
    assert answer.error["param"] == param
