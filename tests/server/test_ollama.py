"""Ollama's tools, think and format: parts of an answer as its clients expect them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from agent_streams import start_family
from harness import RunningServer, StartServer

from families import CALLS, FAMILIES, TOOLS

CHAT, GENERATE = "/api/chat", "/api/generate"
MESSAGES = [{"role": "user", "content": "What time is it?"}]
QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")
PLAIN = next(family for family in FAMILIES if family.reasoning is None and family.tools)


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    return start_family(start_server, QWEN3, compat=("ollama",))


def ask(server: RunningServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of an answer; of a whole one there is one."""
    answer = server.post(path, {"model": server.engine.served_model_names[0], **fields})
    assert answer.status == 200, answer.body
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines


def message(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole message of some lines."""
    whole: dict[str, Any] = {"content": "", "thinking": "", "tool_calls": []}
    for line in lines:
        assert line["message"]["role"] == "assistant"
        for key in whole:
            whole[key] += line["message"].get(key, type(whole[key])())
    return whole


def calls(whole: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in whole["tool_calls"]]
    assert [function["index"] for function in functions] == list(range(len(functions)))
    assert len({call["id"] for call in whole["tool_calls"]}) == len(functions)
    return [(function["name"], function["arguments"]) for function in functions]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts_have_places_of_their_own(server: RunningServer, stream: bool) -> None:
    lines = ask(server, CHAT, messages=MESSAGES, tools=TOOLS, stream=stream)
    whole = message(lines)
    assert (len(lines) > 1) is stream
    assert calls(whole) == CALLS
    assert whole["content"].strip() == QWEN3.content
    assert whole["thinking"].strip() == (QWEN3.thought or "").strip()
    assert lines[-1]["done_reason"] == "stop"
    metrics = server.get("/metrics").body.decode()
    assert 'tool_call_parser_invocations_total{engine="0",' in metrics
    prompt = server.engine.tokenizer.decode(server.engine.submitted[-1][0], False)
    assert '"clock"' in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_left_out(server: RunningServer, stream: bool) -> None:
    cut = QWEN3.says.rindex("</tool_call>") - 4
    options = {"num_predict": cut}
    lines = ask(server, CHAT, messages=MESSAGES, tools=TOOLS, options=options, stream=stream)
    assert calls(message(lines)) == CALLS[:-1]
    assert lines[-1]["done_reason"] == "length"


def test_calls_in_a_history_are_objects(server: RunningServer) -> None:
    call = {"function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_name": "clock", "content": "noon"},
    ]
    ask(server, CHAT, messages=history, tools=TOOLS, stream=False)
    prompt = server.engine.tokenizer.decode(server.engine.submitted[-1][0], False)
    assert '{"name": "clock", "arguments": {"zone": "Oslo"}}' in prompt
    assert "noon" in prompt


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize("stream", [False, True])
def test_think(start_server: StartServer, path: str, stream: bool) -> None:
    server = start_family(start_server, QWEN3, compat=("ollama",))
    server.engine.said = "<think>\nHm.\n</think>\n\nNoon."
    asked: dict[str, Any] = {"prompt": "Time?"} if path == GENERATE else {"messages": MESSAGES}

    def parts(**fields: Any) -> tuple[str, str]:
        lines = ask(server, path, stream=stream, **asked, **fields)
        if path == CHAT:
            whole = message(lines)
            return whole["content"].strip(), whole["thinking"].strip()
        texts = [(line["response"], line.get("thinking", "")) for line in lines]
        return "".join(a for a, _ in texts).strip(), "".join(b for _, b in texts).strip()

    for think in (None, True, "high"):
        assert parts(think=think) == ("Noon.", "Hm.")
    # The template has a switch; a model that reasons all the same is not overheard.
    server.engine.said = "Noon."
    assert parts(think=False) == ("Noon.", "")
    prompt = server.engine.tokenizer.decode(server.engine.submitted[-1][0], False)
    assert prompt.endswith("<think>\n\n</think>\n\n")


def test_a_model_that_does_not_think_says_so(start_server: StartServer) -> None:
    server = start_family(start_server, PLAIN, compat=("ollama",))
    name = server.engine.served_model_names[0]
    for think in (True, "low"):
        answer = server.post(CHAT, {"model": name, "messages": MESSAGES, "think": think})
        assert answer.status == 400
        assert "think" in answer.json["error"]
    ask(server, CHAT, messages=MESSAGES, think=False, stream=False)
    assert server.post("/api/show", {"model": name}).json["capabilities"] == ["completion", "tools"]


def test_what_a_model_can_is_shown(server: RunningServer) -> None:
    shown = server.post("/api/show", {"model": server.engine.served_model_names[0]}).json
    assert shown["capabilities"] == ["completion", "tools", "thinking"]


@pytest.mark.parametrize(
    ("path", "asked"), [(CHAT, {"messages": MESSAGES}), (GENERATE, {"prompt": "x"})]
)
def test_format_binds_the_answer(server: RunningServer, path: str, asked: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"hour": {"type": "integer"}}}
    for form, kind in (("json", "json_object"), (schema, "json")):
        ask(server, path, format=form, stream=False, **asked)
        constraint = server.engine.submitted[-1][1].structured_outputs
        assert constraint.kind == kind
    ask(server, path, format="", stream=False, **asked)
    assert server.engine.submitted[-1][1].structured_outputs is None


def test_a_bad_tool_is_named(server: RunningServer) -> None:
    body = {"model": server.engine.served_model_names[0], "messages": MESSAGES}
    answer = server.post(CHAT, {**body, "tools": [{"type": "function", "function": {}}]})
    assert answer.status == 400
    assert "tools[0].function.name" in answer.json["error"]
