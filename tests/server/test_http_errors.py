"""Every way to be wrong: the status, the shape, the field's name, and the server goes on."""

from __future__ import annotations

import http.client
import json
import logging
import sys
from typing import Any

import pytest
from fake_engine import FakeEngine
from harness import RunningServer, StartServer, eventually

from octavo.cli.log_format import TextFormatter
from octavo.server.http import limits
from octavo.server.routes import ROUTES

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


# path, fields beside the prompt or messages, the name in ``param``
WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": "ten"}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"max_tokens": "1.5"}, "max_tokens"),
    (CHAT, {"max_tokens": ""}, "max_tokens"),
    (CHAT, {"max_tokens": "1_0"}, "max_tokens"),
    (CHAT, {"max_tokens": "٤"}, "max_tokens"),
    (CHAT, {"max_tokens": "9" * 100}, "max_tokens"),
    (CHAT, {"temperature": "nan"}, "temperature"),
    (CHAT, {"temperature": "1e400"}, "temperature"),
    (CHAT, {"temperature": "2.1"}, "temperature"),
    (CHAT, {"temperature": "9" * 1_000_000}, "temperature"),
    (CHAT, {"logit_bias": {"1": "101"}}, "logit_bias"),
    (CHAT, {"stop_token_ids": [True]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": ["-1"]}, "stop_token_ids"),
    (CHAT, {"max_tokens": True}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (COMPLETION, {"max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"max_tokens": 2**40}, "max_tokens"),
    (CHAT, {"temperature": -0.1}, "temperature"),
    (CHAT, {"temperature": 2.1}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_p": 1.01}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"min_p": 2}, "min_p"),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -2.5}, "frequency_penalty"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": limits.MAX_N + 1}, "n"),
    (CHAT, {"seed": "x"}, "seed"),
    (CHAT, {"stream_interval": 0}, "stream_interval"),
    (CHAT, {"spaces_between_special_tokens": 2}, "spaces_between_special_tokens"),
    (CHAT, {"seed": 1.5}, "seed"),
    (CHAT, {"stop": ["a"] * 17}, "stop"),
    (CHAT, {"stop": "a" * 257}, "stop"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop_token_ids": ["a"]}, "stop_token_ids"),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"ignore_eos": 2}, "ignore_eos"),
    (CHAT, {"bad_words": "x"}, "bad_words"),
    (CHAT, {"bad_words": ["x"] * 129}, "bad_words"),
    (CHAT, {"allowed_token_ids": []}, "allowed_token_ids"),
    (CHAT, {"allowed_token_ids": [1] * 4097}, "allowed_token_ids"),
    (CHAT, {"logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (CHAT, {"logprobs": 2}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprob_token_ids": [5]}, "logprob_token_ids"),
    (CHAT, {"logprobs": True, "logprob_token_ids": [5.5]}, "logprob_token_ids"),
    (CHAT, {"logprobs": True, "logprob_token_ids": [1] * 129}, "logprob_token_ids"),
    (COMPLETION, {"logprob_token_ids": [5]}, "logprob_token_ids"),
    (
        COMPLETION,
        {"echo": True, "max_tokens": 0, "logprobs": 1, "logprob_token_ids": [5]},
        "logprob_token_ids",
    ),
    (COMPLETION, {"logprobs": 21}, "logprobs"),
    (COMPLETION, {"logprobs": True}, "logprobs"),
    (COMPLETION, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETION, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETION, {"prompt_logprobs": True}, "prompt_logprobs"),
    (COMPLETION, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"stream": "maybe"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (
        CHAT,
        {"stream": True, "stream_options": {"include_usage": 2}},
        "stream_options.include_usage",
    ),
    (CHAT, {"priority": "high"}, "priority"),
    (CHAT, {"priority": 1.5}, "priority"),
    (CHAT, {"cache_salt": ""}, "cache_salt"),
    (CHAT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (CHAT, {"truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
    (CHAT, {"model": 7}, "model"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [1]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [*MESSAGES, {"role": "", "content": "x"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}]},
        "messages[0].content[0].refusal",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0]",
    ),
    (
        CHAT,
        {"add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    (CHAT, {"chat_template_kwargs": []}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"structured_outputs": {"regex": 1}}, "structured_outputs"),
    (CHAT, {"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    (COMPLETION, {"guided_choice": []}, "guided_choice"),
    (COMPLETION, {"guided_grammar": 1}, "guided_grammar"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": ["a", [1]]}, "prompt"),
    (COMPLETION, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETION, {"prompt": [True]}, "prompt"),
    (COMPLETION, {"prompt": ["a"] * 1025}, "prompt"),
    (COMPLETION, {"prompt": [9999]}, "prompt"),
    (COMPLETION, {"prompt": [-1]}, "prompt"),
    (COMPLETION, {"prompt": ["a"] * 1000, "n": 100}, "n"),
    (COMPLETION, {"prompt": None}, "prompt"),
]

# Known or unknown: nothing that would change the answer is ignored.
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (CHAT, {"structured_outputs": {"frobnicate": {}}}, "structured_outputs.frobnicate"),
    (CHAT, {"echo": True}, "echo"),
    (CHAT, {"verbosity": "low"}, "verbosity"),
    (CHAT, {"documents": [{"text": "x"}]}, "documents"),
    (CHAT, {"chat_template": "x"}, "chat_template"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"frobnicate": 1}, "frobnicate"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (COMPLETION, {"suffix": "x"}, "suffix"),
    (COMPLETION, {"best_of": 2}, "best_of"),
    (COMPLETION, {"max_completion_tokens": 5}, "max_completion_tokens"),
    (COMPLETION, {"messages": MESSAGES}, "messages"),
]


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    return {**base, **fields}


def test_wrong_values_are_named(server: RunningServer) -> None:
    for path, fields, param in WRONG_VALUES:
        payload = body_of(path, fields)
        answer = server.post(path, payload)
        assert (answer.status, answer.error["param"]) == (400, param), (fields, answer.body)
        assert answer.error["type"] == "invalid_request_error"
        assert param.split("[")[0].split(".")[0] in answer.error["message"]
    assert server.engine.submitted == []
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200


def test_unsupported_fields_are_named(server: RunningServer) -> None:
    for path, fields, param in UNSUPPORTED:
        answer = server.post(path, body_of(path, fields))
        assert (answer.status, answer.error["param"]) == (400, param), (fields, answer.body)
        assert answer.error["code"] == "unsupported_parameter"
    assert server.engine.submitted == []


def test_fields_that_ask_for_nothing_pass(server: RunningServer) -> None:
    bookkeeping = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
    }
    nothing = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "logit_bias": {},
        "stop": [],
        "logprobs": False,
        "prompt_logprobs": None,
        "frobnicate": None,
        "modalities": ["text"],
        "include_reasoning": True,
        "verbosity": "medium",
        "documents": [],
        # Of this model, which has no levels of it.
        "reasoning_effort": "low",
    }
    assert server.post(CHAT, body_of(CHAT, {**bookkeeping, **nothing})).status == 200
    nothing = {"suffix": "", "best_of": 1}
    assert server.post(COMPLETION, body_of(COMPLETION, {**bookkeeping, **nothing})).status == 200


INT64 = 2**63
ENDS: list[tuple[str, str, int, int]] = [
    (CHAT, "seed", -INT64, INT64 - 1),
    (COMPLETION, "seed", -INT64, INT64 - 1),
    (CHAT, "top_k", -1, 2**31 - 1),
    (CHAT, "max_tokens", 1, 2**31 - 1),
    (CHAT, "max_completion_tokens", 1, 2**31 - 1),
    (COMPLETION, "max_tokens", 1, 2**31 - 1),
    (CHAT, "n", 1, limits.MAX_N),
    (CHAT, "stream_interval", 1, 2**31 - 1),
]


@pytest.mark.parametrize(("path", "name", "least", "most"), ENDS)
@pytest.mark.parametrize("form", ["{}", '"{}"'])
def test_both_ends_of_a_range_hold_on_the_wire(
    server: RunningServer, path: str, name: str, least: int, most: int, form: str
) -> None:
    """As text: what a parser makes of integers past 64 bits must not slip back into the range."""
    start = json.dumps(body_of(path, {}))[:-1].encode()

    def status(value: int) -> int:
        text = form.format(value).encode()
        answer = server.post(path, start + b', "%b": %b}' % (name.encode(), text))
        assert answer.status == 200 or answer.error["param"] == name
        return answer.status

    for value in (least, most):
        assert status(value) == 200, value
    for value in (least - 1, most + 1, 2 * least - 2, -INT64 - 1, -INT64 - 1025, 2 * INT64, 10**30):
        assert status(value) == 400, value


def test_played_back_assistant_messages_pass(server: RunningServer) -> None:
    first = server.post(CHAT, {"messages": MESSAGES}).json["choices"][0]["message"]
    again = {**first, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    for message in (first, again):
        assert server.post(CHAT, {"messages": [*MESSAGES, message, *MESSAGES]}).status == 200


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        ({"role": "critic", "content": "No."}, "critic\nNo."),
        ({"role": "function", "name": "f", "content": "3"}, "function\n3"),
        ({"role": "function", "name": "f", "content": None}, "function\n"),
        (
            {"role": "user", "content": "a", "id": "1", "cache_control": {"type": "e"}, "x": [1]},
            "user\na",
        ),
        ({"role": "assistant", "content": "a", "annotations": [{"type": "url"}]}, "assistant\na"),
        ({"role": "assistant", "content": None, "refusal": "I won't."}, "assistant\nI won't."),
        ({"role": "assistant", "content": "b", "refusal": "I won't."}, "assistant\nb"),
        ({"role": "assistant", "content": None, "audio": {"id": "a1"}}, "assistant\n"),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f"}},
            "assistant\n<f>",
        ),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}]}, "user\na"),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "a", "signature": "s"},
                    {"type": "output_text", "text": "b", "annotations": []},
                    {"type": "refusal", "refusal": "c"},
                    "d",
                ],
            },
            "assistant\na\nb\nc\nd",
        ),
    ],
)
def test_messages_that_other_servers_take_pass(
    start_server: StartServer, message: dict[str, Any], rendered: str
) -> None:
    engine = FakeEngine()
    engine.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}"
        "{% if m.function_call %}<{{ m.function_call.name }}>{% endif %}|{% endfor %}"
    )
    server = start_server(engine)
    answer = server.post(CHAT, {"messages": [*MESSAGES, message]})
    assert answer.status == 200, answer.body
    prompt = engine.tokenizer.decode(engine.submitted[-1][0], False)
    assert prompt == f"user\n{MESSAGES[0]['content']}|{rendered}|"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"[1]",
        b'"x"',
        b"[" * 10**5,
    ],
)
def test_bad_json(server: RunningServer, body: bytes) -> None:
    answer = server.post(COMPLETION, body)
    assert answer.status == 400
    assert "JSON" in answer.error["message"]


def test_content_types(server: RunningServer) -> None:
    body = {"prompt": "x"}
    for wrong in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        answer = server.post(COMPLETION, body, {"Content-Type": wrong})
        assert answer.status == 415
        assert answer.error["code"] == "unsupported_content_type"
    for right in ("application/json; charset=utf-8", "Application/JSON"):
        assert server.post(COMPLETION, body, {"Content-Type": right}).status == 200


def test_unknown_model(server: RunningServer) -> None:
    for path in (CHAT, COMPLETION):
        answer = server.post(path, body_of(path, {"model": "gpt-4"}))
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found"
        assert answer.error["param"] == "model"


def test_unknown_routes_and_methods(server: RunningServer) -> None:
    for path in ("/v1", "/v1/nothing", "/v1/models/", "/v1/chat/completions/"):
        answer = server.get(path)
        assert answer.status == 404, path
        assert answer.error["type"] == "invalid_request_error"
    for method, path, allow in (
        ("GET", COMPLETION, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("OPTIONS", CHAT, "POST"),
    ):
        answer = server.request(method, path)
        assert answer.status == 405
        assert answer.headers["allow"] == allow
        assert answer.error["code"] == "method_not_allowed"
    assert server.request("HEAD", "/v1/models").status == 200


def test_an_answer_to_head_is_the_head_of_the_answer_to_get(server: RunningServer) -> None:
    """A body behind it would be taken for the next answer on the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for entry in ROUTES:
        if "GET" not in entry.methods:
            continue
        path = entry.path.replace("{name:path}", "octavo")
        found = []
        for method in ("HEAD", "GET"):
            connection.request(method, path)
            response = connection.getresponse()
            response.read()
            ignored = {"date", "x-request-id", "content-length"}
            headers = {k.lower(): v for k, v in response.getheaders()}
            found.append((response.status, {k: headers[k] for k in headers.keys() - ignored}))
            assert ("content-length" in headers) or ("transfer-encoding" in headers), path
        assert found[0] == found[1], path
    connection.close()


def test_a_route_that_is_not_served_is_unknown(server: RunningServer) -> None:
    for name in ("assistants", "messages/batches", "files"):
        answer = server.post(f"/v1/{name}", {"input": "x"})
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert f"/v1/{name}" in answer.error["message"]


def test_too_long_a_prompt_names_both_numbers(server: RunningServer) -> None:
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}),
        (COMPLETION, {"prompt": "x" * 600}),
        (COMPLETION, {"prompt": [7] * 600}),
        (COMPLETION, {"prompt": "x" * 600, "echo": True, "max_tokens": 0}),
        (COMPLETION, {"prompt": "x" * 512 * 200}),
    ):
        answer = server.post(path, body_of(path, fields))
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert "512" in answer.error["message"]
        assert answer.error["param"] == ("messages" if path == CHAT else "prompt")
    assert 'reason="context_length_exceeded"' in server.get("/metrics").body.decode()


def test_wrong_keys_of_logit_bias_are_named(server: RunningServer) -> None:
    bias = {"bad1": 1, "7": 1, "bad2": -1}
    answer = server.post(COMPLETION, {"prompt": "x", "logit_bias": bias})
    assert "'bad1', 'bad2'" in answer.error["message"]
    many = {f"bad{n}": 1 for n in range(1000)}
    answer = server.post(COMPLETION, {"prompt": "x", "logit_bias": many})
    assert answer.status == 400
    assert len(answer.error["message"]) < 300


def test_a_prompt_is_truncated_on_demand(server: RunningServer) -> None:
    answer = server.post(COMPLETION, {"prompt": "abcdef", "truncate_prompt_tokens": 3})
    assert answer.status == 200
    assert server.engine.submitted[0][0] == list(b"def")
    answer = server.post(COMPLETION, {"prompt": "x" * 600, "truncate_prompt_tokens": -1})
    assert answer.status == 200
    assert len(server.engine.submitted[1][0]) == 511


def test_large_bodies(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODY_BYTES", 1000)
    answer = server.post(COMPLETION, {"prompt": "x" * 1000})
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"
    with server.socket() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(30):
            sock.sendall(b"64\r\n" + b" " * 100 + b"\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("splits", [False, True])
def test_large_heads(server: RunningServer, splits: bool) -> None:
    with server.socket() as sock:
        line = b"X-Filler: " + b"y" * 1000 + b"\r\n"
        parts = [b"GET /health HTTP/1.1\r\nHost: localhost\r\n", *[line] * 20, b"\r\n"]
        try:
            for part in parts if splits else [b"".join(parts)]:
                sock.sendall(part)
        except OSError:
            pass  # refused before all was sent: as good
        data = sock.recv(4096)
    assert data.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"header_too_large"' in data


def test_what_is_not_http(server: RunningServer) -> None:
    with server.socket() as sock:
        sock.sendall(b"\x16\x03\x01 hello?\r\n\r\n")
        data = sock.recv(4096)
    assert data.startswith(b"HTTP/1.1 400 ")
    assert b'"error"' in data


def test_a_body_that_never_comes(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BODY_SILENCE_S", 0.05)
    with server.socket() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_an_unforeseen_error(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "submit", fail)
        answer = server.post(COMPLETION, {"prompt": "x"}, {"X-Request-Id": "abc-1"})
    assert answer.status == 500
    assert answer.error["message"] == "internal error (request id abc-1)"
    assert b"secret" not in answer.body
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200


def test_a_failed_request_fails_alone(server: RunningServer) -> None:
    server.engine.fail_after = 0
    answer = server.post(COMPLETION, {"prompt": "x"})
    assert answer.status == 500
    assert answer.error["code"] == "generation_failed"
    # Early enough to have a status of its own, even as a stream.
    assert server.post(COMPLETION, {"prompt": "x", "stream": True}).status == 500
    server.engine.fail_after = None
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200


def test_messages_quote_little(server: RunningServer) -> None:
    answer = server.post(CHAT, {"messages": MESSAGES, "model": "m" * 100_000})
    assert len(answer.body) < 1300
    answer = server.post(CHAT, {"messages": MESSAGES, "k" * 100_000: 1})
    assert len(answer.body) < 1300
    answer = server.post(CHAT, {"messages": MESSAGES, "temperature": "t" * 100_000})
    assert len(answer.body) < 1300


def test_no_template(start_server: StartServer) -> None:
    from fake_engine import FakeEngine

    engine = FakeEngine()
    engine.chat_template = None
    server = start_server(engine)
    answer = server.post(CHAT, {"messages": MESSAGES})
    assert answer.status == 400
    assert "--chat-template" in answer.error["message"]
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200


def test_a_queue_that_is_full(server: RunningServer) -> None:
    server.engine.max_unfinished = 3
    # The third prompt does not fit: the first two must not stay behind.
    answer = server.post(COMPLETION, {"prompt": ["a", "b"], "n": 2})
    assert answer.status == 503
    assert answer.error["code"] == "queue_full"
    assert answer.headers["retry-after"] == "1"
    assert len(server.engine.aborted) == 2
    assert server.get("/load").json == {"server_load": 0}
    assert 'reason="queue_full"' in server.get("/metrics").body.decode()


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("depth", [2, 500, 1000])
def test_a_value_may_be_nested_as_deeply_as_json_allows(server: RunningServer, depth: int) -> None:
    """``repr`` goes less deep: a refusal must not need it."""
    served = [entry for entry in ROUTES if entry.body is not None]
    assert len(served) > 5
    for entry in served:
        assert entry.body is not None
        for name in entry.body.fields:
            for value in (deep(depth), b'{"a":%b}' % deep(depth)):
                body = b'{"%b":%b}' % (name.encode(), value)
                answer = server.post(entry.path, body)
                assert answer.status in (400, 503), (entry.path, name, answer.body)
                assert len(answer.body) < 400


def test_a_tool_call_of_deep_arguments(start_server: StartServer) -> None:
    """The template is given a call's arguments as an object, where they are one."""
    engine = FakeEngine()
    engine.chat_template = "{% for m in messages %}{{ m.tool_calls | length }}{% endfor %}"
    server = start_server(engine)
    for depth in (1, 900, 100_000):
        function = {"name": "f", "arguments": deep(depth).decode()}
        message = {"role": "assistant", "tool_calls": [{"function": function}]}
        answer = server.post(CHAT, {"messages": [*MESSAGES, message], "max_tokens": 1})
        assert answer.status == 200, answer.body


def test_names_are_quoted_in_part(server: RunningServer) -> None:
    name = "n" * 5000
    for path, fields in (
        (CHAT, {name: 1}),
        (CHAT, {"model": name}),
        (CHAT, {"stream": True, "stream_options": {name: 1}}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": name}]}]}),
        (CHAT, {"max_tokens": name}),
        (COMPLETION, {"temperature": name}),
        (COMPLETION, {"logit_bias": {name: 1}}),
    ):
        answer = server.post(path, body_of(path, fields))
        assert answer.status in (400, 404)
        for text in (answer.error["message"], answer.error["param"] or ""):
            assert text.count("n" * 90) <= 1, text
            assert len(text) < 250
    assert server.get("/" + name).error["message"].count("n") < 110


# ------------------------------------------------------------------------------------- RFC 9112


def raw(server: RunningServer, *lines: str, body: bytes = b"") -> bytes:
    with server.socket() as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return sock.recv(65536)


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        ("1.1", ["localhost"], 200),
        ("1.1", ["localhost:8000"], 200),
        ("1.1", ["[::1]:8000"], 200),
        ("1.1", [], 400),
        ("1.1", ["localhost", "localhost"], 400),
        ("1.1", ["localhost", "evil.example"], 400),
        ("1.1", ["localhost, evil.example"], 400),
        ("1.1", ["local host"], 400),
        ("1.0", [], 200),
        ("1.0", ["localhost", "evil.example"], 400),
    ],
)
def test_a_request_has_one_host(
    server: RunningServer, version: str, hosts: list[str], status: int
) -> None:
    data = raw(server, f"GET /version HTTP/{version}", *(f"Host: {host}" for host in hosts))
    assert data.startswith(f"HTTP/1.1 {status} ".encode()), data
    assert (b'"error"' in data) == (status == 400)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (["Transfer-Encoding: chunked"], 200),
        (["Transfer-Encoding: Chunked"], 200),
        (["Transfer-Encoding: gzip, chunked"], 501),
        (["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"], 501),
        (["Transfer-Encoding: chunked, chunked"], 400),
        (["Transfer-Encoding: chunked, gzip"], 400),
        (["Transfer-Encoding: gzip"], 400),
        (["Transfer-Encoding: identity"], 400),
        (["Transfer-Encoding: xchunked"], 400),
        (["Transfer-Encoding: chunked", "Content-Length: 5"], 400),
    ],
)
def test_transfer_codings(server: RunningServer, headers: list[str], status: int) -> None:
    body = b'{"prompt":"x"}'
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    data = raw(server, *head, *headers, body=chunks)
    assert data.startswith(f"HTTP/1.1 {status} ".encode()), data
    if status != 200:
        assert b"\r\nconnection: close\r\n" in data.lower()


def test_http_1_0_has_no_transfer_codings(server: RunningServer) -> None:
    head = ["POST /v1/completions HTTP/1.0", "Content-Type: application/json"]
    data = raw(server, *head, "Transfer-Encoding: chunked", body=b"0\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 400 ")


# ----------------------------------------------------------------------------------------- logs


def test_a_path_reaches_the_log_as_it_was_sent(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo.server")
    server = start_server(enable_log_requests=True)
    assert server.get("/%0aFAKE%20INFO%20x%1b[31m?q=%0a").status == 404
    eventually(lambda: caplog.messages)
    [message] = caplog.messages
    assert message.startswith("GET /%0aFAKE%20INFO%20x%1b[31m 404 ")
    assert server.get("/" + "x" * 5000).status == 404
    eventually(lambda: len(caplog.messages) == 2)
    assert len(caplog.messages[1]) < 1200


def test_a_log_line_is_one_line() -> None:
    formatter = TextFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("no\nFAKE \x1b[31m")
    except ValueError:
        record = logging.LogRecord(
            "octavo", logging.INFO, "x", 1, "a\nb\x1b[0m\x85\u2028 %s", ("é\r",), sys.exc_info()
        )
    first, *rest = formatter.format(record).split("\n")
    assert first == r"INFO a\x0ab\x1b[0m\x85\u2028 é\x0d"
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
