"""/v1/responses: items in and out, every event in its order, and what is kept between them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from agent_streams import FLAT_TOOLS, RESPONSES, events, fold_response, start_family, without
from fake_engine import FakeEngine
from harness import Answer, RunningServer, StartServer, eventually

from families import CALLS, FAMILIES, Family
from octavo.server.responses.custom_input import CustomInput
from octavo.server.responses.items import oldest_first_cuts

pytestmark = pytest.mark.system

QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")
THINKING = next(family for family in FAMILIES if family.template == "qwen3_thinking")
NEW = ("id", "call_id", "created_at", "completed_at")
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin" /.+/'},
}


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    answer = server.post(RESPONSES, {"input": "What time is it?", **fields})
    assert answer.status == 200, answer.body
    return dict(answer.json)


def stream(server: RunningServer, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    body = {"input": "What time is it?", "stream": True, **fields}
    answer = server.post(RESPONSES, body)
    assert answer.status == 200, answer.body
    return events(answer.body)


def prompt(server: RunningServer) -> str:
    """What the model was last asked."""
    ids = server.engine.submitted[-1][0]
    return str(server.engine.tokenizer.decode(ids, False))


def says(name: str, arguments: str) -> str:
    call = f'{{"name": "{name}", "arguments": {arguments}}}'
    return f"<think>\nHm.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"


# ------------------------------------------------------------------------------- answers


def test_text_whole_and_streamed(server: RunningServer) -> None:
    whole = ask(server, metadata={"a": "b"}, temperature=0.5, instructions="Be brief.")
    assert whole["object"] == "response"
    assert whole["id"].startswith("resp_")
    assert whole["status"] == "completed"
    assert (whole["metadata"], whole["temperature"]) == ({"a": "b"}, 0.5)
    assert whole["instructions"] == "Be brief."
    [item] = whole["output"]
    assert item["type"] == "message"
    [part] = item["content"]
    assert part.keys() == {"type", "text", "annotations", "logprobs"}
    usage = whole["usage"]
    assert usage["input_tokens"] == len(server.engine.submitted[-1][0])
    num_kept = usage["input_tokens"] // 16 * 16
    assert usage["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": num_kept - 3}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    fields = {"metadata": {"a": "b"}, "temperature": 0.5, "instructions": "Be brief."}
    for _ in range(3):
        assert without(fold_response(stream(server, **fields)), *NEW) == without(whole, *NEW)


def test_the_events_of_text_exactly(server: RunningServer) -> None:
    names = [name.removeprefix("response.") for name, _ in stream(server)]
    deltas = names.count("output_text.delta")
    assert deltas > 0
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_a_stream_folds_to_the_whole(start_server: StartServer, family: Family) -> None:
    server = start_family(start_server, family)
    whole = ask(server, tools=FLAT_TOOLS)
    output = whole["output"]
    calls = [item for item in output if item["type"] == "function_call"]
    found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    assert found == list(family.calls)
    assert len({call["call_id"] for call in calls}) == len(calls)
    thoughts = [i["content"][0]["text"] for i in output if i["type"] == "reasoning"]
    assert "".join(thoughts).strip() == (family.thought or "")
    text = "".join(i["content"][0]["text"] for i in output if i["type"] == "message")
    assert text.strip() == family.content
    assert {item["status"] for item in output} == {"completed"}
    reasoning = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert (reasoning > 0) is bool(family.thought)
    for _ in range(2):
        folded = fold_response(stream(server, tools=FLAT_TOOLS))
        assert without(folded, *NEW) == without(whole, *NEW)


def test_every_cut_folds_to_the_whole(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    for most in range(1, len(QWEN3.says.encode()), 7):
        fields = {"tools": FLAT_TOOLS, "max_output_tokens": most}
        whole = ask(server, **fields)
        assert whole["status"] == "incomplete"
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
        statuses = [item["status"] for item in whole["output"]]
        assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete"]
        assert without(fold_response(stream(server, **fields)), *NEW) == without(whole, *NEW)


def test_logprobs_are_those_of_the_text(server: RunningServer) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(server, **fields)
    [part] = whole["output"][0]["content"]
    assert len(part["logprobs"]) == whole["usage"]["output_tokens"]
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    folded = fold_response(stream(server, **fields))
    assert folded["output"][0]["content"] == [part]


def test_the_tokens_are_shown_to_who_asks(server: RunningServer) -> None:
    fields = {"instructions": "Be brief.", "enable_response_messages": True}
    whole = ask(server, **fields)
    folded = fold_response(stream(server, **fields))
    for response in (whole, folded):
        [read], [written] = response["input_messages"], response["output_messages"]
        assert read["type"] == written["type"] == "raw_message_tokens"
        assert read["tokens"] == list(server.engine.submitted[-1][0])
        assert "Be brief." in read["message"]
        assert len(written["tokens"]) == response["usage"]["output_tokens"]
        assert response["output"][0]["content"][0]["text"] in written["message"]
    assert "input_messages" not in ask(server)


def test_calls_beyond_the_most_are_ignored(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    for fields, most in (
        ({"max_tool_calls": 1}, 1),
        ({"max_tool_calls": 0}, 0),
        ({"parallel_tool_calls": False}, 1),
        ({"max_tool_calls": 9}, 2),
    ):
        whole = ask(server, tools=FLAT_TOOLS, **fields)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds.count("function_call") == most
        folded = fold_response(stream(server, tools=FLAT_TOOLS, **fields))
        assert without(folded, *NEW) == without(whole, *NEW)


def test_formats_become_constraints(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    whole = ask(server, text={"format": form, "verbosity": "low"})
    assert whole["text"]["format"] == form
    assert json.loads(server.engine.submitted[-1][1].structured_outputs.text) == schema
    ask(server, text={"format": {"type": "json_object"}})
    assert server.engine.submitted[-1][1].structured_outputs.kind == "json_object"
    ask(server, text={"format": {"type": "text"}})
    assert server.engine.submitted[-1][1].structured_outputs is None


def test_effort_switches_reasoning(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    ask(server, reasoning={"effort": "none"})
    assert prompt(server).endswith("</think>\n\n")
    whole = ask(server, reasoning={"effort": "high", "summary": "auto"})
    assert not prompt(server).endswith("</think>\n\n")
    assert whole["reasoning"] == {"effort": "high", "summary": "auto"}


# --------------------------------------------------------------------------------- tools


def test_unknown_tools_are_skipped_and_named(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    tools = [*FLAT_TOOLS, {"type": "web_search"}, {"type": "local_shell"}, {"type": "w\r\nx: y"}]
    answer = server.post(RESPONSES, {"input": "x", "tools": tools})
    assert answer.status == 200
    assert answer.headers["warning"].startswith("299 octavo ")
    assert "web_search, local_shell, w??x: y" in answer.headers["warning"]
    told = answer.json["tools"]
    assert [tool["type"] for tool in told] == [tool["type"] for tool in tools]
    assert told[0].keys() == {"type", "name", "description", "parameters", "strict"}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"input": "*** Begin\\n\\"a\\" \\\\ \\u00fc \\ud83d\\ude00"}', '*** Begin\n"a" \\ ü 😀'),
        ('{"input": ""}', ""),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ('"x y"', "x y"),
        ('{"more": 1, "input": "late"}', "late"),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'),
    ],
)
def test_a_custom_tool_is_called_with_a_text(
    start_server: StartServer, arguments: str, wanted: str
) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.said = says("apply_patch", arguments)
    whole = ask(server, tools=[PATCH])
    _, call = whole["output"]
    assert call["type"] == "custom_tool_call"
    assert (call["name"], call["input"]) == ("apply_patch", wanted)
    assert "start: " in prompt(server)
    for _ in range(5):
        folded = fold_response(stream(server, tools=[PATCH]))
        assert without(folded, *NEW) == without(whole, *NEW)
    back = [{"role": "user", "content": "x"}, *whole["output"]]
    back.append({"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "ok"})
    ask(server, tools=[PATCH], input=back)
    text = prompt(server)
    assert json.dumps({"input": wanted}, ensure_ascii=False) in text
    assert "<tool_response>\nok\n</tool_response>" in text


@pytest.mark.parametrize(
    "text", ['{"input": "a\\n\\u00e9\\ud83d\\ude00 z\\\\"}', '{"x": 1}', '"s"']
)
def test_custom_inputs_however_they_are_cut(text: str) -> None:
    whole = CustomInput()
    wanted = whole.push(text) + whole.finish()
    for at in range(len(text) + 1):
        parts = CustomInput()
        assert parts.push(text[:at]) + parts.push(text[at:]) + parts.finish() == wanted
        assert parts.text == wanted


def test_a_custom_tool_that_must_be_called_follows_its_grammar(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.said = "<think>\nHm.\n</think>\n\n*** Begin it"
    fields = {
        "tools": [*FLAT_TOOLS, PATCH],
        "tool_choice": {"type": "custom", "name": PATCH["name"]},
    }
    whole = ask(server, **fields)
    constraint = server.engine.submitted[-1][1].structured_outputs
    assert (constraint.kind, constraint.text) == ("grammar", PATCH["format"]["definition"])
    assert [item["type"] for item in whole["output"]] == ["reasoning", "custom_tool_call"]
    assert whole["output"][1]["input"] == "*** Begin it"
    assert without(fold_response(stream(server, **fields)), *NEW) == without(whole, *NEW)


def test_namespaces_are_flattened_and_told_apart_again(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    server.engine.said = says("mcp__git.log", '{"n": 1}')
    tools = [
        {"type": "namespace", "name": "mcp__git", "tools": [{"type": "function", "name": "log"}]}
    ]
    whole = ask(server, tools=tools)
    call = whole["output"][1]
    assert (call["namespace"], call["name"]) == ("mcp__git", "log")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "none"}
    ask(server, tools=tools, input=[{"role": "user", "content": "x"}, call, output])
    assert '"name": "mcp__git.log"' in prompt(server)


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", "auto", ["clock", "now"]),
        ("required", "required", ["clock", "now"]),
        ("none", "none", ["clock", "now"]),
        ({"type": "function", "name": "now"}, "named", ["now"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "now"}],
            },
            "required",
            ["now"],
        ),
    ],
)
def test_tool_choice(choice: Any, mode: str, names: list[str]) -> None:
    from octavo.server.responses.protocol import parse_response

    body = {"input": "x", "tools": FLAT_TOOLS, "tool_choice": choice}
    use = parse_response(body).tools.use
    assert (use.mode, [tool.name for tool in use.tools]) == (mode, names)


# --------------------------------------------------------------------------------- input


def test_items_become_turns(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    first = ask(server, tools=FLAT_TOOLS, include=["reasoning.encrypted_content"])
    # As Codex sends them back: without ids, and without the content of reasoning.
    output = [without(item, "id", "status") for item in first["output"]]
    sealed = output[0].pop("encrypted_content")
    assert (QWEN3.thought or "").encode() in base64.b64decode(sealed)
    output[0]["content"] = None
    output[0]["encrypted_content"] = sealed
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": f"result {number}"}
        for number, item in enumerate(output)
        if item["type"] == "function_call"
    ]
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "U1"}]},
        {"role": "user", "content": "U2"},
        *output,
        *reversed(results),
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ]
    answer = server.post(RESPONSES, {"input": items, "instructions": "I", "tools": FLAT_TOOLS})
    assert answer.status == 200, answer.body
    assert "web_search_call" in answer.headers["warning"]
    text = prompt(server)
    assert "I\nD" in text[: text.index("<|im_start|>user")]
    assert "<|im_start|>user\nU1\nU2<|im_end|>" in text
    said = text[text.index("U2") :]
    places = [said.index(part) for part in ("A thought.", "Look:", '"name": "clock"')]
    places += [said.index(part) for part in ("result 2", "result 3")]
    assert places == sorted(places)
    # One turn of the assistant before the results.
    assert said.count("<|im_start|>assistant") == 2


def test_reasoning_of_other_servers_is_left_out(server: RunningServer) -> None:
    for content in ("gAAAAABo", base64.b64encode(b"other").decode(), "%%%"):
        items = [
            {"role": "user", "content": "x"},
            {"type": "reasoning", "summary": [], "encrypted_content": content},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "z"},
        ]
        ask(server, input=items)
        assert "assistant\ny<|im_end|>" in prompt(server)


def test_a_history_may_end_with_a_thought(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "T"}],
    }
    ask(server, input=[{"role": "user", "content": "Hello."}, thought])
    text = prompt(server)
    assert text.index("Hello.") < text.index("T\n") < text.rindex("<|im_start|>assistant")


def test_empty_input_is_answered(server: RunningServer) -> None:
    """Clients look whether a server is there."""
    ask(server, input=[], max_output_tokens=1)
    assert prompt(server).startswith("<|im_start|>user\n<|im_end|>")
    ask(server, input="", instructions="I", surprise=True, service_tier="flex")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_0"}]}, "input[0].id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "function", "name": "x", "parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [{"type": "custom", "name": "x", "format": {"type": "y"}}]}, "tools[0].format"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"truncation": "middle"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_refusals_name_the_field(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post(RESPONSES, {"input": "x", **fields})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"


def test_unknown_models_are_not_found(server: RunningServer) -> None:
    assert server.post(RESPONSES, {"input": "x", "model": "gpt-9"}).status == 404


def test_input_tokens(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    fields = {"input": "x", "tools": FLAT_TOOLS, "instructions": "I"}
    count = server.post(RESPONSES + "/input_tokens", {"model": "alias", **fields}).json
    num = ask(server, **fields)["usage"]["input_tokens"]
    assert count == {"object": "response.input_tokens", "input_tokens": num}


# ---------------------------------------------------------------------------- truncation


def _turns(number: int) -> list[dict[str, Any]]:
    return [
        item
        for n in range(number)
        for item in (
            {"role": "user", "content": f"question {n}"},
            {"type": "function_call", "call_id": f"c{n}", "name": "clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{n}", "output": f"output {n}"},
            {"role": "assistant", "content": f"answer {n}"},
        )
    ]


def test_truncation_drops_the_oldest(server: RunningServer) -> None:
    items = [{"role": "developer", "content": "Always."}, *_turns(20)]
    items.append({"role": "user", "content": "last"})
    body = {"input": items, "instructions": "I"}
    answer = server.post(RESPONSES, body)
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    whole = ask(server, **body, truncation="auto", max_output_tokens=20)
    assert whole["truncation"] == "auto"
    text = prompt(server)
    assert text.startswith("<|im_start|>system\nI\nAlways.<|im_end|>")
    assert "question 0" not in text
    assert "answer 19" in text
    num = whole["usage"]["input_tokens"]
    # As many as fit: one turn more would not.
    assert 512 - 200 < num <= 512 - 20
    assert ask(server, input=_turns(2), truncation="auto")["usage"]["input_tokens"] < num


def test_truncation_never_parts_a_call_from_its_output() -> None:
    items = [{"type": "message", **item} if "role" in item else item for item in _turns(3)]
    cuts = oldest_first_cuts(items)
    assert cuts[0] == 0
    for cut in cuts:
        assert not items[cut]["type"].endswith("_output")
    assert 11 in cuts


# --------------------------------------------------------------------------------- state


def test_a_conversation_goes_on_by_id(start_server: StartServer) -> None:
    server = start_family(start_server, QWEN3)
    first = ask(server, tools=FLAT_TOOLS, instructions="only here")
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    assert len(calls) == len(CALLS)
    outputs = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
        for call in calls
    ]
    second = ask(server, input=outputs, previous_response_id=first["id"], tools=FLAT_TOOLS)
    text = prompt(server)
    assert "only here" not in text
    assert text.index("What time is it?") < text.index("A thought.") < text.index("noon")
    third = ask(server, input="Thanks", previous_response_id=second["id"])
    text = prompt(server)
    assert text.index("noon") < text.index("Thanks")
    assert third["previous_response_id"] == second["id"]

    # Each can be asked for, and what went into it.
    assert server.get(f"{RESPONSES}/{second['id']}").json == second
    listed = server.get(f"{RESPONSES}/{third['id']}/input_items?limit=100&order=asc").json
    kinds = [item["type"] for item in listed["data"]]
    assert kinds[0] == "message"
    assert kinds.count("function_call_output") == 2
    ids = [item["id"] for item in listed["data"]]
    assert len(set(ids)) == len(ids)
    page = server.get(f"{RESPONSES}/{third['id']}/input_items?limit=2").json
    assert [one["id"] for one in page["data"]] == ids[:-3:-1]
    assert page["has_more"]
    after = f"limit=2&after={page['last_id']}"
    page = server.get(f"{RESPONSES}/{third['id']}/input_items?{after}").json
    assert [one["id"] for one in page["data"]] == ids[-3:-5:-1]

    # What goes on from a response outlives it.
    gone = server.request("DELETE", f"{RESPONSES}/{first['id']}")
    assert gone.json == {"id": first["id"], "object": "response", "deleted": True}
    assert server.get(f"{RESPONSES}/{first['id']}").status == 404
    ask(server, input="More", previous_response_id=third["id"])
    assert "What time is it?" in prompt(server)


def test_streamed_responses_are_kept_too(server: RunningServer) -> None:
    response = fold_response(stream(server))
    assert server.get(f"{RESPONSES}/{response['id']}").json == response


def not_found(answer: Answer, param: str | None = None) -> None:
    assert answer.status == 404, answer.body
    assert answer.error["code"] == "not_found"
    assert answer.error["param"] == param


@pytest.mark.parametrize("flags", [{"response_store": False}, {}])
def test_what_is_not_kept(start_server: StartServer, flags: dict[str, Any]) -> None:
    server = start_server(**flags)
    whole = ask(server, store=False) if not flags else ask(server)
    not_found(server.get(f"{RESPONSES}/{whole['id']}"))
    body = {"input": "x", "previous_response_id": whole["id"]}
    not_found(server.post(RESPONSES, body), "previous_response_id")
    assert len(server.lifecycle.state.responses) == 0


def test_each_key_sees_its_own(start_server: StartServer) -> None:
    server = start_server(api_key=("one", "two"))
    mine, theirs = {"Authorization": "Bearer one"}, {"x-api-key": "two"}
    made = server.post(RESPONSES, {"input": "x"}, mine).json
    path = f"{RESPONSES}/{made['id']}"
    for method, suffix in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/input_items"),
        ("POST", "/cancel"),
    ):
        body = {} if method == "POST" else None
        not_found(server.request(method, path + suffix, body, theirs))
    body = {"input": "x", "previous_response_id": made["id"]}
    not_found(server.post(RESPONSES, body, theirs), "previous_response_id")
    assert server.post(RESPONSES, body, mine).status == 200
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    body = {"input": [reference, {"role": "user", "content": "z"}]}
    assert server.post(RESPONSES, body, theirs).status == 400
    assert server.post(RESPONSES, body, mine).status == 200
    text = made["output"][0]["content"][0]["text"]
    assert text in prompt(server)


def test_nothing_is_in_the_background(server: RunningServer) -> None:
    made = ask(server)
    answer = server.post(f"{RESPONSES}/{made['id']}/cancel", {})
    assert answer.status == 400
    assert "Cannot cancel" in answer.error["message"]
    assert server.get(f"{RESPONSES}/{made['id']}?stream=true").status == 400
    not_found(server.post(f"{RESPONSES}/resp_0/cancel", {}))
    assert server.post(f"{RESPONSES}/compact", {}).status == 404


# ----------------------------------------------------------------------------- transport


def test_a_websocket_is_refused_with_426(start_server: StartServer) -> None:
    server = start_server()
    head = (
        f"GET {RESPONSES} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "OpenAI-Beta: responses_websockets=2026-02-06\r\n\r\n"
    )
    with server.socket() as sock:
        sock.sendall(head.encode())
        data = b""
        while chunk := sock.recv(4096):
            data += chunk
    lines = data.split(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 426 ")
    assert b"connection: close" in lines
    answer = server.get(RESPONSES)
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


def test_a_failure_in_a_stream(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.said = "many words " * 20
    engine.fail_after = 100
    server = start_server(engine)
    engine.delay_s = 0.01
    found = stream(server)
    name, last = found[-1]
    assert name == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    assert len(server.lifecycle.state.responses) == 0


def test_a_client_that_leaves_aborts(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.hold = True
    server = start_server(engine)
    body = json.dumps({"input": "x", "stream": True}).encode()
    with server.socket() as sock:
        head = f"POST {RESPONSES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: engine.running)
    eventually(lambda: engine.aborted)
