"""Tool calls and reasoning on the wire: a stream holds what the whole answer holds, in OpenAI's form."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from fake_engine import IM_END, IM_START, ByteTokenizer, FakeEngine
from harness import RunningServer, StartServer
from test_streams import CHAT, events

from families import CALLS, FAMILIES, HERMES, TOOLS, Family
from octavo.server.http.config import ServerConfig
from octavo.server.work.state import ServerState

pytestmark = pytest.mark.system

MESSAGES = [{"role": "user", "content": "What time is it?"}]
QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")
THINKING = next(family for family in FAMILIES if family.template == "qwen3_thinking")


def start_family(start_server: StartServer, family: Family, **flags: Any) -> RunningServer:
    engine = FakeEngine(max_model_len=8192)
    engine.chat_template = family.source
    engine.said = family.says
    return start_server(engine, **flags)


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, **fields})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def stream(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "tools": TOOLS, "stream": True, **fields}
    answer = server.post(CHAT, body)
    assert answer.status == 200, answer.body
    return events(answer.body)


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A stream's choice as a whole answer has it, and the rules of the wire on the way."""
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    calls = message["tool_calls"]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    for choice in choices[1:]:
        delta = choice["delta"]
        assert "role" not in delta
        message["content"] += delta.get("content", "")
        assert delta.get("reasoning") == delta.get("reasoning_content")
        message["reasoning"] += delta.get("reasoning", "")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                # A call opens with all but its arguments, once.
                assert set(part) == {"index", "id", "type", "function"}
                assert part["type"] == "function"
                assert part["function"].keys() == {"name", "arguments"}
                assert part["function"]["arguments"] == ""
                calls.append({"id": part["id"], **part["function"]})
            else:
                # Of the last one only: calls do not alternate.
                assert part["index"] == len(calls) - 1
                assert set(part) == {"index", "function"}
                assert set(part["function"]) == {"arguments"}
                calls[-1]["arguments"] += part["function"]["arguments"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    return {"message": message, "finish_reason": choices[-1]["finish_reason"]}


def plain(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """A whole answer's choice in the form of ``joined``."""
    choice = answer["choices"][index]
    message = choice["message"]
    assert message["role"] == "assistant"
    assert message["reasoning"] == message["reasoning_content"]
    calls = []
    for call in message["tool_calls"]:
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function"
        calls.append({"id": call["id"], **call["function"]})
    if message["content"] is None:
        assert calls or message["reasoning"]
    return {
        "message": {
            "content": message["content"] or "",
            "reasoning": message["reasoning"] or "",
            "tool_calls": calls,
        },
        "finish_reason": choice["finish_reason"],
    }


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice["message"]["tool_calls"]
    bare = [{key: call[key] for key in call if key != "id"} for call in calls]
    return {**choice, "message": {**choice["message"], "tool_calls": bare}}


def check_content(family: Family, choice: dict[str, Any]) -> None:
    message = choice["message"]
    found = [(call["name"], json.loads(call["arguments"])) for call in message["tool_calls"]]
    assert found == list(family.calls)
    assert message["content"].strip() == family.content
    assert message["reasoning"].strip() == (family.thought or "")
    assert choice["finish_reason"] == ("tool_calls" if family.calls else "stop")
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)
    for number, one in enumerate(ids):
        match family.tools:
            case "mistral" | "mistral_array":
                assert re.fullmatch("[a-zA-Z0-9]{9}", one)
            case "kimi_k2":
                assert one == f"functions.{found[number][0]}:{number}"
            case _:
                assert re.fullmatch("call_[0-9a-f]{24}", one)


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "return_token_ids": True}])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_a_stream_says_what_the_whole_answer_says(
    start_server: StartServer, family: Family, fields: dict[str, Any]
) -> None:
    server = start_family(start_server, family)
    answer = ask(server, **fields)
    whole = plain(answer)
    check_content(family, whole)
    options = {"include_usage": True}
    for _ in range(3):
        chunks = stream(server, stream_options=options, **fields)
        *rest, last = chunks
        streamed = joined(rest)
        check_content(family, streamed)
        assert without_ids(streamed) == without_ids(whole)
        for usage in (last["usage"], answer["usage"]):
            details = usage["completion_tokens_details"]
            assert (details["reasoning_tokens"] > 0) is bool(family.thought)
        if fields:
            # Every token is reported once, whatever it became.
            tokens = [t for c in rest for x in c["choices"] for t in x.get("token_ids") or ()]
            assert tokens == answer["choices"][0]["token_ids"]
            scored = [
                entry["token"]
                for c in rest
                for x in c["choices"]
                for entry in (x["logprobs"] or {"content": []})["content"]
            ]
            assert scored == [e["token"] for e in answer["choices"][0]["logprobs"]["content"]]


def test_samples_do_not_mix(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    chunks = stream(server, n=3)
    answer = ask(server, n=3)
    for index in range(3):
        check_content(QWEN3, joined(chunks, index))
        check_content(QWEN3, plain(answer, index))
    ids = [c["id"] for choice in answer["choices"] for c in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 6


def test_an_answer_without_channels_is_as_before(start_server: StartServer) -> None:
    server = start_server()
    answer = server.post(CHAT, {"messages": MESSAGES}).json
    assert server.engine.submitted[-1][2]["channels"] is None
    assert "completion_tokens_details" not in answer["usage"]
    message = answer["choices"][0]["message"]
    assert (message["tool_calls"], message["reasoning"]) == ([], None)
    assert message["content"]


def test_a_call_that_is_cut_ends_with_length(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    at = QWEN3.says.encode().index(b"HB")
    answer = plain(ask(server, max_tokens=at))
    assert answer["finish_reason"] == "length"
    [call] = answer["message"]["tool_calls"]
    assert json.dumps(CALLS[0][1], ensure_ascii=False).startswith(call["arguments"])
    assert call["arguments"]
    streamed = joined(stream(server, max_tokens=at))
    assert without_ids(streamed) == without_ids(answer)


@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "clock", "argu',
        "<tool_call>\nclock()\n</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call> and so on',
    ],
)
def test_a_broken_call_is_content(start_server: StartServer, broken: str) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.said = "Look: " + broken
    answer = plain(ask(server))
    streamed = joined(stream(server))
    assert without_ids(streamed) == without_ids(answer)
    if not answer["message"]["tool_calls"]:
        assert answer["finish_reason"] == "stop"
        assert answer["message"]["content"] == server.engine.said


# ------------------------------------------------------------------------ tool_choice

NAMED = {"type": "function", "function": {"name": "clock"}}


def prompt_of(server: RunningServer) -> str:
    return str(server.engine.tokenizer.decode(server.engine.submitted[-1][0], False))


def test_no_calls_are_read_where_there_may_be_none(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        choice = plain(ask(server, **fields))
        assert choice["message"]["tool_calls"] == []
        assert choice["message"]["content"].endswith(HERMES)
        assert choice["message"]["reasoning"].strip() == QWEN3.thought
        assert choice["finish_reason"] == "stop"
        assert without_ids(joined(stream(server, **fields))) == without_ids(choice)


@pytest.mark.parametrize("excluded", [False, True])
def test_tools_that_may_not_be_called(start_server: StartServer, excluded: bool) -> None:
    server = start_family(start_server, QWEN3, exclude_tools_when_tool_choice_none=excluded)
    ask(server, tool_choice="none")
    assert ('"clock"' in prompt_of(server)) is not excluded


def test_auto_may_be_switched_off(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3, enable_auto_tool_choice=False)
    assert plain(ask(server))["message"]["tool_calls"] == []


def test_allowed_tools_alone_are_described(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    allowed = {"mode": "auto", "tools": [NAMED]}
    ask(server, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert '"clock"' in prompt_of(server)
    assert '"now"' not in prompt_of(server)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": "clock"}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {**NAMED, "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "maybe"}, "parallel_tool_calls"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"include_reasoning": 2}, "include_reasoning"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_a_bad_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, **fields})
    assert answer.status == 400
    assert answer.error["param"] == param


# ------------------------------------------------------------------------ constraints


def grammar_of(server: RunningServer) -> str | None:
    constraint = server.engine.submitted[-1][1].structured_outputs
    return None if constraint is None else constraint.grammar


@pytest.mark.parametrize(
    ("fields", "is_bound"),
    [
        ({}, True),
        ({"tool_choice": "none"}, False),
        ({"parallel_tool_calls": True}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": NAMED}, True),
        ({"tools": [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]}, True),
    ],
)
def test_a_grammar_binds_what_is_asked_for(
    start_server: StartServer, fields: dict[str, Any], is_bound: bool
) -> None:
    server = start_family(start_server, QWEN3)
    ask(server, **fields)
    grammar = grammar_of(server)
    assert (grammar is not None) is is_bound
    if grammar is not None:
        assert "<tool_call>" in grammar
        assert "clock" in grammar
        constraint = server.engine.submitted[-1][1].structured_outputs
        is_auto = "tool_choice" not in fields
        is_repeated = fields.get("parallel_tool_calls") is not False
        expected = (("<tool_call>",), is_repeated, ())
        assert constraint.trigger == (expected if is_auto else None)
        has_schema = "digits" in grammar
        assert has_schema is (not is_auto or "tools" in fields)
    if fields.get("tool_choice") == NAMED:
        assert "now" not in grammar
        assert plain(ask(server, **fields))["finish_reason"] == "stop"


def test_a_schema_that_no_grammar_can_follow_binds_the_name(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.no_grammars = ("digits",)
    ask(server, tool_choice="required")
    grammar = grammar_of(server)
    assert grammar is not None
    assert "clock" in grammar
    assert "digits" not in grammar
    assert "tool clock: its schema is not followed" in caplog.text


def test_calls_that_no_grammar_can_hold_are_refused(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.no_grammars = ("clock",)
    answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"})
    assert (answer.status, answer.error["param"]) == (400, "tools")


def test_a_model_without_calls_cannot_be_made_to(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3, tool_call_parser="none")
    answer = server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"})
    assert (answer.status, answer.error["param"]) == (400, "tool_choice")


@pytest.fixture
def think_tokens(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Markers of reasoning that are tokens of the fake vocabulary."""
    tokens = {"<think>": IM_START, "</think>": IM_END}
    monkeypatch.setattr(ByteTokenizer, "token_to_id", lambda self, token: tokens.get(token))
    return tokens


def test_constraints_begin_behind_the_reasoning(
    start_server: StartServer, think_tokens: dict[str, int]
) -> None:
    def reasoning(server: RunningServer, **fields: Any) -> Any:
        ask(server, **fields)
        return server.engine.submitted[-1][2]["reasoning"]

    server = start_family(start_server, QWEN3)
    assert reasoning(server) == (IM_START, IM_END, False, None)
    assert reasoning(server, thinking_token_budget=7) == (IM_START, IM_END, False, 7)
    assert reasoning(server, reasoning_effort="none") is None
    server = start_family(start_server, THINKING)
    assert reasoning(server) == (IM_START, IM_END, True, None)


def test_a_budget_needs_a_token_that_ends_the_reasoning(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    answer = server.post(CHAT, {"messages": MESSAGES, "thinking_token_budget": 5})
    assert (answer.status, answer.error["param"]) == (400, "thinking_token_budget")


# -------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize("streams", [False, True])
def test_reasoning_may_be_left_out(start_server: StartServer, streams: bool) -> None:
    server = start_family(start_server, QWEN3)
    if streams:
        chunks = stream(server, include_reasoning=False)
        assert not any("reasoning" in c["choices"][0]["delta"] for c in chunks if c["choices"])
        choice = joined(chunks)
    else:
        choice = plain(ask(server, include_reasoning=False))
    assert choice["message"]["reasoning"] == ""
    assert choice["message"]["content"].strip() == QWEN3.content
    assert len(choice["message"]["tool_calls"]) == 2


def test_the_prompts_tail_decides(start_server: StartServer) -> None:
    """The same text is all reasoning, or none, by what the template wrote before it."""
    server = start_family(start_server, QWEN3)
    server.engine.said = "Hm.\n</think>\n\nYes."
    assert plain(ask(server))["message"]["reasoning"] == ""
    server = start_family(start_server, THINKING)
    server.engine.said = "Hm. It never ends."
    choice = plain(ask(server, max_tokens=10))
    assert choice == {
        "message": {"content": "", "reasoning": "Hm. It nev", "tool_calls": []},
        "finish_reason": "length",
    }
    # A question about the tag opens nothing.
    server = start_family(start_server, QWEN3)
    server.engine.said = "A tag."
    messages = [{"role": "user", "content": "What is <think>"}]
    assert plain(ask(server, messages=messages))["message"]["content"] == "A tag."


def test_a_continued_message_may_be_inside_its_reasoning(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.said = "more.\n</think>\n\nYes."
    for begun, content in (("<think>\nOne", "Yes."), ("<think>\nOne</think>", None)):
        messages = [*MESSAGES, {"role": "assistant", "content": begun}]
        fields = {"continue_final_message": True, "add_generation_prompt": False}
        choice = plain(ask(server, messages=messages, **fields))
        if content is None:
            assert choice["message"]["reasoning"] == ""
        else:
            assert choice["message"]["content"].strip() == content


@pytest.mark.parametrize(
    ("fields", "closed"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"reasoning_effort": "none"}, True),
        ({"reasoning_effort": "high"}, False),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            False,
        ),
    ],
)
def test_reasoning_is_switched_by_the_template(
    start_server: StartServer, fields: dict[str, Any], closed: bool
) -> None:
    server = start_family(start_server, QWEN3)
    ask(server, **fields)
    assert prompt_of(server).endswith("</think>\n\n") is closed


def test_the_operators_variables_are_defaults(start_server: StartServer) -> None:
    kwargs = {"enable_thinking": False}
    server = start_family(start_server, QWEN3, default_chat_template_kwargs=kwargs)
    ask(server)
    assert prompt_of(server).endswith("</think>\n\n")
    ask(server, chat_template_kwargs={"enable_thinking": True})
    assert not prompt_of(server).endswith("</think>\n\n")


def test_parsers_may_be_named_or_switched_off(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3, tool_call_parser="none", reasoning_parser="none")
    assert plain(ask(server))["message"]["content"] == QWEN3.says
    assert server.engine.submitted[-1][2]["channels"] is None
    server = start_family(
        start_server, QWEN3, tool_call_parser="qwen3_xml", reasoning_parser="deepseek_r1"
    )
    assert plain(ask(server))["message"]["reasoning"].strip() == QWEN3.thought


@pytest.mark.parametrize("flag", ["tool_call_parser", "reasoning_parser"])
def test_a_parser_that_there_is_not_ends_the_start(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} must be auto, none"):
        ServerState(ServerConfig(**{flag: "nonesuch"}))


def test_outcomes_are_counted(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    ask(server)
    stream(server)
    ask(server, max_tokens=QWEN3.says.encode().index(b"HB"))
    server.engine.said = "No calls."
    ask(server)
    ask(server, tools=[])
    ask(server, tool_choice="none")
    name = "vllm:tool_call_parser_invocations_total"
    lines = server.get("/metrics").body.decode().splitlines()
    found = {
        re.search('status="(.*?)"', line)[1]: float(line.rpartition(" ")[2])  # type: ignore[index]
        for line in lines
        if line.startswith(name + "{")
    }
    assert found == {"called": 2, "cut": 1, "none": 1}


def test_a_template_of_its_own_describes_tools(start_server: StartServer) -> None:
    engine = FakeEngine(max_model_len=8192)
    engine.chat_template = "{% for m in messages %}plain {{ m.content }}{% endfor %}"
    engine.tool_template = QWEN3.source
    engine.said = QWEN3.says
    server = start_server(engine)
    check_content(QWEN3, plain(ask(server)))
    assert "<tools>" in prompt_of(server)
    ask(server, tools=[])
    assert prompt_of(server) == "plain What time is it?"


# ------------------------------------------------------------------------ histories


def test_a_turn_of_calls_comes_back(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    message = ask(server)["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}
        for call in message["tool_calls"]
    ]
    ask(server, messages=[*MESSAGES, message, *results])
    prompt = prompt_of(server)
    assert f"<think>\n{QWEN3.thought}\n</think>" in prompt
    assert prompt.count("<tool_response>") == 2
    assert '<tool_call>\n{"name": "clock", "arguments": {"zone": "Oslo"}}' in prompt


def test_kimis_ids_count_on(start_server: StartServer) -> None:
    family = next(one for one in FAMILIES if one.template == "kimi_k2")
    server = start_family(start_server, family)
    message = ask(server)["choices"][0]["message"]
    assert [c["id"] for c in message["tool_calls"]] == [
        "functions.clock:0",
        "functions.clock:1",
    ]


# ------------------------------------------------------------------- OpenAI's own client


def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_the_openai_client_reads_calls(start_server: StartServer) -> None:
    chat: Any = client(start_family(start_server, QWEN3)).chat.completions
    message = chat.create(model="alias", messages=MESSAGES, tools=TOOLS).choices[0].message
    names = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls]
    assert names == CALLS
    assert message.reasoning_content.strip() == QWEN3.thought


def test_the_openai_clients_stream_helper_reads_calls(start_server: StartServer) -> None:
    chat: Any = client(start_family(start_server, QWEN3)).chat.completions
    with chat.stream(model="alias", messages=MESSAGES, tools=TOOLS) as events:
        done = [
            (event.name, json.loads(event.arguments))
            for event in events
            if event.type == "tool_calls.function.arguments.done"
        ]
        final = events.get_final_completion().choices[0]
    assert done == CALLS
    assert final.finish_reason == "tool_calls"
    assert [
        (c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls
    ] == CALLS
