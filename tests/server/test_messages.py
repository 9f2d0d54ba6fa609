"""/v1/messages: Anthropic's form, whole and streamed, in and out."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from agent_streams import ANTHROPIC_TOOLS, MESSAGES, events, fold_message, start_family, without
from fake_engine import FakeEngine
from harness import RunningServer, StartServer, eventually

from families import FAMILIES, Family
from octavo.server.anthropic.partial_json import read_object

pytestmark = pytest.mark.system

HI = [{"role": "user", "content": "What time is it?"}]
BODY: dict[str, Any] = {"model": "claude-opus-5", "max_tokens": 32000, "messages": HI}
QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")
THINKING = next(family for family in FAMILIES if family.template == "qwen3_thinking")
NEW = ("id", "x-request-id")


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    answer = server.post(MESSAGES + "?beta=true", {**BODY, **fields})
    assert answer.status == 200, answer.body
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return dict(answer.json)


def stream(server: RunningServer, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    answer = server.post(MESSAGES, {**BODY, "stream": True, **fields})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"]
    return events(answer.body)


def refused(server: RunningServer, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = server.post(MESSAGES, {**BODY, **fields})
    assert answer.status == status, answer.body
    value = answer.json
    assert value.keys() == {"type", "error", "request_id"}
    assert value["type"] == "error"
    assert value["request_id"] == answer.headers["request-id"]
    return dict(value["error"])


def prompt(server: RunningServer) -> str:
    """What the model was last asked."""
    ids = server.engine.submitted[-1][0]
    return str(server.engine.tokenizer.decode(ids, False))


def test_text_whole_and_streamed(server: RunningServer) -> None:
    whole = ask(server)
    assert whole["type"] == "message"
    assert whole["role"] == "assistant"
    assert whole["model"] == "claude-opus-5"
    [block] = whole["content"]
    assert block["type"] == "text"
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    num_prompt = len(server.engine.submitted[-1][0])
    usage = whole["usage"]
    # Whole blocks of 16 tokens are kept; what is behind them is computed each time.
    assert usage["cache_read_input_tokens"] == 3
    assert usage["cache_creation_input_tokens"] == num_prompt // 16 * 16 - 3 > 0
    assert usage["input_tokens"] == num_prompt % 16
    assert usage["output_tokens"] > 0
    for _ in range(3):
        folded = fold_message(stream(server))
        assert without(folded, *NEW) == without(whole, *NEW)


def test_without_a_cache_nothing_is_written_to_it(server: RunningServer) -> None:
    server.engine.prefix_block_size = None
    usage = ask(server)["usage"]
    assert usage["cache_creation_input_tokens"] == 0
    num_prompt = len(server.engine.submitted[-1][0])
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt


@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "disabled"}, None])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_a_stream_folds_to_the_whole(
    start_server: StartServer, family: Family, thinking: Any
) -> None:
    server = start_family(start_server, family)
    thinks = thinking == {"type": "adaptive"}
    if family.opened and family.toggle and not thinks:
        # The prompt closes the reasoning; the model does not go on with it.
        server.engine.said = family.says.partition("</think>")[2]
    fields = {"tools": ANTHROPIC_TOOLS, "thinking": thinking}
    whole = ask(server, **fields)
    blocks = whole["content"]
    calls = [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"]
    assert calls == list(family.calls)
    assert whole["stop_reason"] == ("tool_use" if family.calls else "end_turn")
    thoughts = [block for block in blocks if block["type"] == "thinking"]
    if thinks and family.thought:
        assert [one["thinking"].strip() for one in thoughts] == [family.thought]
        assert thoughts[0]["signature"]
    else:
        assert not thoughts
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    assert text.strip() == family.content
    for _ in range(2):
        folded = fold_message(stream(server, **fields))
        assert without(folded, *NEW) == without(whole, *NEW)


def test_every_cut_folds_to_the_whole(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    for most in range(1, len(QWEN3.says.encode()), 7):
        fields = {"tools": ANTHROPIC_TOOLS, "thinking": {"type": "adaptive"}, "max_tokens": most}
        whole = ask(server, **fields)
        assert whole["stop_reason"] == "max_tokens"
        folded = fold_message(stream(server, **fields))
        assert without(folded, *NEW) == without(whole, *NEW)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('"x"', {"arguments": "x"}),
        ("[1, 2]", {"arguments": [1, 2]}),
        ("{}", {}),
        ('{"a": {"b": null}}', {"a": {"b": None}}),
    ],
)
def test_input_is_always_an_object(
    start_server: StartServer, arguments: str, wanted: dict[str, Any]
) -> None:
    server = start_family(start_server, QWEN3)
    call = f'{{"name": "clock", "arguments": {arguments}}}'
    server.engine.said = f"<think>\n\n</think>\n\n<tool_call>\n{call}\n</tool_call>"
    whole = ask(server, tools=ANTHROPIC_TOOLS)
    assert [block["input"] for block in whole["content"]] == [wanted]
    folded = fold_message(stream(server, tools=ANTHROPIC_TOOLS))
    assert without(folded, *NEW) == without(whole, *NEW)


def test_a_turn_of_tools_round_trips(start_server: StartServer) -> None:
    """What a client sends back is what the template would have written of the answer."""
    server = start_family(start_server, QWEN3)
    fields = {"tools": ANTHROPIC_TOOLS, "thinking": {"type": "enabled", "budget_tokens": 2000}}
    content = ask(server, **fields)["content"]
    uses = [block for block in content if block["type"] == "tool_use"]
    results = [
        {
            "type": "tool_result",
            "tool_use_id": use["id"],
            "content": [{"type": "text", "text": f"result {number}"}],
            "is_error": number == 1,
        }
        for number, use in enumerate(uses)
    ]
    # Anthropic's clients may answer in any order, and add to it.
    back = [*reversed(results), {"type": "text", "text": "And now?"}]
    messages = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": back}]
    ask(server, messages=messages, **fields)
    text = prompt(server)
    said = text.index(QWEN3.thought or "")
    places = [text.index(part, said) for part in ("Look:", '"name": "clock"', "result 0")]
    places += [text.index(part, said) for part in ("Error: result 1", "And now?")]
    assert places == sorted(places)


def test_system_and_blocks_reach_the_model(server: RunningServer) -> None:
    system = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]
    document = {"type": "document", "title": "T", "source": {"type": "text", "data": "D"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, document]},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "three"},
    ]
    ask(server, system=system, messages=messages, metadata={"user_id": "u"}, surprise=1)
    assert prompt(server) == (
        "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n"
        "<|im_start|>user\none\nT\nD\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>system\nlate<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_late_system_text_is_a_user_s_where_the_template_refuses_it(
    start_server: StartServer,
) -> None:
    engine = FakeEngine()
    engine.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system first') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    server = start_server(engine)
    ask(server, messages=[*HI, {"role": "system", "content": "late"}])
    assert prompt(server) == "user: What time is it?\nlate\n"


def test_prefill(server: RunningServer) -> None:
    started = {"role": "assistant", "content": "It is"}
    ask(server, messages=[*HI, started])
    assert prompt(server).endswith("<|im_start|>assistant\nIt is")
    for content in ("It is ", "", [{"type": "tool_use", "id": "t", "name": "n", "input": {}}]):
        message = refused(server, messages=[*HI, {"role": "assistant", "content": content}])
        assert message["type"] == "invalid_request_error"
        assert message["message"].startswith("messages: ")


def test_stop_sequences(server: RunningServer) -> None:
    text = ask(server)["content"][0]["text"]
    stop = text[5:8]
    whole = ask(server, stop_sequences=["never", stop])
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", stop)
    assert whole["content"][0]["text"] == text[: text.index(stop)]
    folded = fold_message(stream(server, stop_sequences=["never", stop]))
    assert without(folded, *NEW) == without(whole, *NEW)


def test_max_tokens_is_clamped(server: RunningServer) -> None:
    ask(server, max_tokens=10**6)
    whole = ask(server, max_tokens=2)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 2


def test_an_answer_of_nothing_is_an_empty_text(start_server: StartServer) -> None:
    server = start_family(start_server, THINKING)
    server.engine.said = "A thought without an end"
    whole = ask(server)
    assert without(whole["content"], "citations") == [{"type": "text", "text": ""}]
    assert whole["usage"]["output_tokens"] > 10
    assert without(fold_message(stream(server)), *NEW) == without(whole, *NEW)


def test_thinking_is_switched(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    ask(server)
    assert prompt(server).endswith("<think>\n\n</think>\n\n")
    ask(server, thinking={"type": "adaptive"}, output_config={"effort": "high"})
    assert not prompt(server).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("choice", "mode", "parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "now"}, "named", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
    ],
)
def test_tool_choice(choice: dict[str, Any], mode: str, parallel: bool) -> None:
    from octavo.server.anthropic.protocol import parse_messages

    use = parse_messages({**BODY, "tools": ANTHROPIC_TOOLS, "tool_choice": choice}).tool_use
    assert (use.mode, use.parallel) == (mode, parallel)
    assert [tool.name for tool in use.tools] == (["now"] if mode == "named" else ["clock", "now"])


def test_one_call_where_parallel_ones_are_off(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    whole = ask(server, tools=ANTHROPIC_TOOLS, tool_choice=choice)
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    folded = fold_message(stream(server, tools=ANTHROPIC_TOOLS, tool_choice=choice))
    assert without(folded, *NEW) == without(whole, *NEW)


def test_tools_of_anthropic_s_servers_are_skipped_and_named(start_server: StartServer) -> None:
    server = start_server(FakeEngine(max_model_len=4096))
    tools = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "custom", "name": "mine", "input_schema": {"type": "object"}},
    ]
    answer = server.post(MESSAGES, {**BODY, "tools": tools})
    assert answer.status == 200
    assert "web_search_20250305" in answer.headers["warning"]
    assert "bash" not in answer.headers["warning"]
    assert '"name": "bash"' in prompt(server)
    assert '"name": "mine"' in prompt(server)


def test_json_schema_becomes_a_constraint(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        ask(server, **fields)
        wanted = server.engine.submitted[-1][1].structured_outputs
        assert json.loads(wanted.text) == schema


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"model": None}, "model is missing"),
        ({"messages": []}, "messages must be"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0: image blocks are not supported",
        ),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}, "max_tokens": 2048},
            "thinking.budget_tokens must be less than max_tokens",
        ),
        ({"tools": [{"name": "x", "input_schema": 5}]}, "tools.0.input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"stop_sequences": "x"}, "stop_sequences"),
    ],
)
def test_refusals_name_the_field(server: RunningServer, fields: dict[str, Any], words: str) -> None:
    error = refused(server, **fields)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_an_image_from_a_tool_is_told_to_the_model(server: RunningServer) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image]}
    messages = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    ask(server, messages=messages)
    assert "an image, which this model cannot see" in prompt(server)


def test_overflow_in_anthropic_s_words(server: RunningServer) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    num_tokens = 600 + len("user\n\nassistant\n") + 3
    error = refused(server, messages=long)
    assert error == {
        "type": "invalid_request_error",
        "message": f"prompt is too long: {num_tokens} tokens > 512 maximum",
    }


def test_errors_have_anthropic_s_form(start_server: StartServer) -> None:
    server = start_server(api_key=("secret",), messages_any_model=False)
    for headers, words in (({}, "no API key"), ({"x-api-key": "no"}, "wrong")):
        answer = server.post(MESSAGES, BODY, headers)
        assert answer.status == 401
        assert answer.json["error"]["type"] == "authentication_error"
        assert words in answer.json["error"]["message"]
    for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
        answer = server.post(MESSAGES, BODY, headers)
        assert answer.status == 404
        assert answer.json["error"]["type"] == "not_found_error"
    answer = server.post(
        MESSAGES, b"{", {"x-api-key": "secret", "content-type": "application/json"}
    )
    assert answer.json["error"]["type"] == "invalid_request_error"
    answer = server.get(MESSAGES, x_api_key="secret")
    assert answer.status == 405
    assert answer.json["type"] == "error"


def test_an_overloaded_server_answers_529(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.max_unfinished = 0
    server = start_server(engine)
    for fields in ({}, {"stream": True}):
        error = refused(server, 529, **fields)
        assert error["type"] == "overloaded_error"
    assert server.post(MESSAGES, BODY).headers["retry-after"]


def test_a_failure_in_a_stream_is_an_event(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.said = "many words " * 20
    engine.fail_after = 100
    engine.delay_s = 0.01
    server = start_server(engine)
    found = stream(server)
    name, last = found[-1]
    assert name == "error"
    assert last["error"]["type"] == "api_error"
    assert all(one != "message_stop" for one, _ in found)


def test_hidden_reasoning_is_pinged(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.server.work import answer as answer_module

    monkeypatch.setattr(answer_module, "HEAD_WAIT_S", 0.05)
    server = start_family(start_server, THINKING, sse_keep_alive_interval=0.05)
    server.engine.said = "thought " * 30 + "</think>\n\nDone."
    server.engine.delay_s = 0.01
    names = [name for name, _ in stream(server)]
    at = names.index("content_block_start")
    assert "ping" in names[2:at]


def test_nothing_comes_before_the_message(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that takes long is pinged by comments, which are no events."""
    from octavo.server.work import answer as answer_module

    monkeypatch.setattr(answer_module, "HEAD_WAIT_S", 0.05)
    engine = FakeEngine()
    engine.hold = True
    server = start_server(engine, sse_keep_alive_interval=0.05)
    threading.Timer(0.5, lambda: setattr(engine, "hold", False)).start()
    body = server.post(MESSAGES, {**BODY, "stream": True}).body
    early, _, rest = body.partition(b"event: message_start\n")
    assert early
    assert set(early.split(b"\n\n")) == {b": ping", b""}
    assert fold_message(events(b"event: message_start\n" + rest))["content"][0]["text"]


def test_a_client_that_leaves_aborts(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.hold = True
    server = start_server(engine)
    body = json.dumps({**BODY, "stream": True}).encode()
    with server.socket() as sock:
        head = f"POST {MESSAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: engine.running)
    eventually(lambda: engine.aborted)


def test_count_tokens(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    fields = {"tools": ANTHROPIC_TOOLS, "system": "Be brief.", "thinking": {"type": "adaptive"}}
    usage = ask(server, **fields)["usage"]
    body = {"model": "claude-haiku", "messages": HI, **fields}
    answer = server.post(MESSAGES + "/count_tokens?beta=true", body)
    assert answer.status == 200
    parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert answer.json == {"input_tokens": sum(usage[part] for part in parts)}


def test_models_in_anthropic_s_form(server: RunningServer) -> None:
    listed = server.get("/v1/models", anthropic_version="2023-06-01").json
    assert [one["id"] for one in listed["data"]] == ["fake/model", "alias"]
    assert (listed["first_id"], listed["last_id"]) == ("fake/model", "alias")
    assert listed["has_more"] is False
    for one in listed["data"]:
        assert one["type"] == "model"
        assert one["created_at"].endswith("Z")
        again = server.get(f"/v1/models/{one['id']}", anthropic_version="x").json
        assert again == one
    assert server.get("/v1/models").json["object"] == "list"


def test_errors_of_models_have_the_form_of_who_asks(start_server: StartServer) -> None:
    server = start_server(FakeEngine(), api_key=("key",))
    version, key = {"anthropic_version": "2023-06-01"}, {"x_api_key": "key"}
    refused = server.get("/v1/models", **version)
    unknown = server.get("/v1/models/none", **version, **key)
    for answer, status, kind in (
        (refused, 401, "authentication_error"),
        (unknown, 404, "not_found_error"),
    ):
        assert answer.status == status
        assert (answer.json["type"], answer.json["error"]["type"]) == ("error", kind)
        assert answer.headers["request-id"] == answer.json["request_id"]
    other = server.get("/v1/models/none", authorization="Bearer key")
    assert (other.status, other.error["code"]) == (404, "model_not_found")
    assert "request-id" not in other.headers


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2, {"b": "x\\"y", "c": -12.5e3, "d": true}], "e": {"f": null, "g": [ ]}, "i": 77}',
        '{"ключ": "\\ud83d\\ude00\\n", "": {"": [[], {}]}}',
        "{}",
    ],
)
def test_a_cut_object_is_read_as_anthropic_s_client_reads_it(text: str) -> None:
    jiter = pytest.importorskip("jiter")
    for end in range(1, len(text) + 1):
        wanted = jiter.from_json(text[:end].encode(), partial_mode=True)
        assert read_object(text[:end]) == wanted, text[:end]
