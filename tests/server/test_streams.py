"""Streams: the same words as whole answers, however they are cut; pings; a client that leaves."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from fake_engine import BOS, EOS, IM_START, WORDS, FakeEngine
from harness import RunningServer, StartServer, eventually
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.server.openai.logprobs import LEAST_LOGPROB, CompletionLogprobs, echo_offsets
from octavo.server.work import answer as answer_module
from octavo.server.work.token_texts import TokenText

pytestmark = pytest.mark.system

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def events(body: bytes) -> list[Any]:
    """The events of a whole stream, which must end with [DONE] and hold nothing else."""
    assert body.endswith(b"\n\n")
    blocks = body.decode().removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def join(chunks: list[Any], is_chat: bool) -> list[dict[str, Any]]:
    """Choices as a whole answer has them."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = choices.setdefault(
                choice["index"],
                {"text": "", "finish_reason": None, "stop_reason": None, "logprobs": None},
            )
            assert whole["finish_reason"] is None, "nothing follows the finish reason"
            text = choice["delta"].get("content") if is_chat else choice["text"]
            whole["text"] += text or ""
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice.get("stop_reason")
            if choice["logprobs"] is not None:
                merge(whole, choice["logprobs"])
            for key in ("token_ids", "prompt_token_ids"):
                if key in choice:
                    whole[key] = whole.get(key, []) + choice[key]
    return [choices[index] for index in sorted(choices)]


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    if whole["logprobs"] is None:
        whole["logprobs"] = part
        return
    for key, value in part.items():
        if isinstance(value, list):
            whole["logprobs"][key] = whole["logprobs"][key] + value


def plain(answer: Any, is_chat: bool) -> list[dict[str, Any]]:
    """A whole answer's choices in the same form."""
    choices = []
    for choice in answer["choices"]:
        # Null where they were not asked for: a stream leaves them out.
        absent = {k for k in ("token_ids", "prompt_token_ids") if choice.get(k, 0) is None}
        absent |= {"index", "message", "prompt_logprobs"}
        clean = {k: v for k, v in choice.items() if k not in absent}
        if is_chat:
            clean["text"] = choice["message"]["content"]
        choices.append(clean)
    return choices


REQUESTS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1), "max_tokens": st.integers(1, 60)},
    optional={
        "n": st.integers(1, 3),
        "stop": st.lists(st.sampled_from([*WORDS, "apit", "京", "🔥", "l o"]), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "return_token_ids": st.booleans(),
        "ignore_eos": st.booleans(),
        "temperature": st.sampled_from([0, 0.5, 1, 2]),
    },
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    fields=REQUESTS,
    is_chat=st.booleans(),
    num_logprobs=st.sampled_from([None, None, 0, 2]),
    echo=st.booleans(),
    include_usage=st.booleans(),
    text=st.text(min_size=1, max_size=20),
)
def test_a_stream_says_what_the_whole_answer_says(
    server: RunningServer,
    fields: dict[str, Any],
    is_chat: bool,
    num_logprobs: int | None,
    echo: bool,
    include_usage: bool,
    text: str,
) -> None:
    body = dict(fields)
    if is_chat:
        path = CHAT
        body["messages"] = [{"role": "user", "content": text}]
        if num_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": num_logprobs}
    else:
        path = COMPLETION
        body["prompt"] = [text, "second"]
        body["echo"] = echo
        if num_logprobs is not None:
            body["logprobs"] = num_logprobs
    whole = server.post(path, body)
    assert whole.status == 200, whole.body
    options = {"include_usage": True} if include_usage else None
    streamed = server.post(path, {**body, "stream": True, "stream_options": options})
    chunks = events(streamed.body)
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == whole.json["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    expected = plain(whole.json, is_chat)
    joined = join(chunks, is_chat)
    for choice in joined if is_chat else []:
        # In chat the prompt's ids belong to the answer, not to its choices.
        choice.pop("prompt_token_ids", None)
    assert joined == expected
    timed = [chunk for chunk in chunks if "timings" in chunk]
    assert len(timed) == len(expected)
    assert all(chunk["choices"][0]["finish_reason"] for chunk in timed)


def test_headers(server: RunningServer) -> None:
    answer = server.post(COMPLETION, {"prompt": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers


def test_plain_streams_are_the_core_s_own_work(server: RunningServer) -> None:
    def delivery(**fields: Any) -> str:
        server.post(COMPLETION, {"prompt": "x", **fields})
        return str(server.engine.submitted[-1][2]["delivery"])

    assert delivery(stream=True) == "sse"
    assert delivery(stream=True, stream_options={"include_usage": True}) == "sse"
    assert delivery(stream=True, echo=True) == "sse"
    assert delivery(stream=True, logprobs=0) == "delta"
    assert delivery(stream=True, return_token_ids=True) == "delta"
    every = {"continuous_usage_stats": True}
    assert delivery(stream=True, stream_options=every) == "sse"
    assert delivery(stream=True, stream_options={**every, "include_usage": True}) == "delta"
    assert delivery() == "final"


def test_an_engine_that_dies_in_the_middle_of_a_stream(server: RunningServer) -> None:
    server.engine.delay_s = 0.05
    with server.socket() as sock:
        send(sock, COMPLETION, {"prompt": "x", "stream": True, "ignore_eos": True, "n": 2})
        data = sock.recv(65536)
        while b"data: " not in data:
            data += sock.recv(65536)
        server.call(server.engine.die)
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(65536)
    blocks = dechunk(data.partition(b"\r\n\r\n")[2]).decode().split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert json.loads(blocks[-3].removeprefix("data: "))["error"]["code"] == "engine_dead"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "return_token_ids": True}),
        (COMPLETION, {"prompt": "x"}),
        (COMPLETION, {"prompt": "x", "echo": True, "logprobs": 1}),
        (COMPLETION, {"prompt": "x", "echo": True, "max_tokens": 0}),
    ],
)
def test_continuous_usage(server: RunningServer, path: str, fields: dict[str, Any]) -> None:
    """Every chunk has the count so far, the one that only opens the stream among them."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"max_tokens": 40, **fields, "stream": True, "stream_options": options}
    chunks = events(server.post(path, body).body)
    usages = [chunk["usage"] for chunk in chunks]
    assert len({usage["prompt_tokens"] for usage in usages}) == 1
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert (counts[0] == 0) == (path == CHAT or "echo" in fields)
    assert chunks[-1]["usage"] == chunks[-2]["usage"]
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("include", [{}, {"include_usage": False}, {"include_usage": None}])
def test_no_usage_is_none_in_any_chunk(
    server: RunningServer, path: str, include: dict[str, Any]
) -> None:
    options = {**include, "continuous_usage_stats": True}
    start = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    chunks = events(server.post(path, {**start, "stream": True, "stream_options": options}).body)
    assert not any(chunk.get("usage") for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


def test_names_that_look_like_json_do_no_harm(server: RunningServer) -> None:
    name = 'x"}],"finish_reason":null\n\ndata: '
    body = {"prompt": "x", "stream": True, "request_id": name}
    chunks = events(server.post(COMPLETION, body).body)
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{name}"}


def test_echo_without_tokens(server: RunningServer) -> None:
    body = {"prompt": ["ab", "cd"], "echo": True, "max_tokens": 0, "n": 2}
    whole = server.post(COMPLETION, body).json
    assert [choice["text"] for choice in whole["choices"]] == ["ab", "ab", "cd", "cd"]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["usage"]["prompt_tokens"] == 6
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(server.post(COMPLETION, stream).body)
    assert chunks[-1]["usage"] == whole["usage"]
    assert server.engine.submitted == []


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("prompt", ["né", ["ab", "né🦊"], [256, 97], [[97, 257, 98], [99]]])
def test_echo_with_logprobs(server: RunningServer, prompt: Any, max_tokens: int) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 2}
    whole = server.post(COMPLETION, body).json
    for choice in whole["choices"]:
        logprobs, text = choice["logprobs"], choice["text"]
        prompt_ids, params, _ = server.engine.submitted[choice["index"] // 2]
        assert params.prompt_logprobs == 2
        num_output = len(logprobs["tokens"]) - len(prompt_ids)
        assert num_output <= max_tokens
        assert num_output or not max_tokens
        assert {len(values) for values in logprobs.values()} == {len(logprobs["tokens"])}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == [-0.25] * (len(logprobs["tokens"]) - 1)
        assert all(1 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        # Of special tokens those that were sent, not the one that the tokenizer put before a text.
        by_ids = not isinstance(prompt if isinstance(prompt, str) else prompt[0], str)
        echoed = server.engine.tokenizer.decode(prompt_ids, not by_ids)
        assert text.startswith(echoed)
        assert all(offset <= len(echoed) for offset in offsets[: len(prompt_ids)])
        for token, offset in zip(logprobs["tokens"], offsets, strict=True):
            if len(token) == 1 and token.isascii():
                assert text[offset] == token
        for token, offset in list(zip(logprobs["tokens"], offsets, strict=True))[: len(prompt_ids)]:
            assert not by_ids or token == "\ufffd" or text.startswith(token, offset)
    options = {"include_usage": True}
    streamed = server.post(COMPLETION, {**body, "stream": True, "stream_options": options})
    chunks = events(streamed.body)
    assert chunks.pop()["usage"] == whole["usage"]
    assert join(chunks, False) == plain(whole, False)


@pytest.mark.parametrize(
    ("prompt", "offsets"),
    [
        # The tokenizer puts <s> before a text.
        ("<|im_start|>a\n<|im_end|>b", [0, 0, 12, 13, 14, 24]),
        ("a</s>", [0, 0, 1]),
        ("<s>a<s>", [0, 0, 3, 4]),
        ("<s><s>", [0, 0, 3]),
        ("", [0]),
        ([BOS, 97, IM_START, EOS, 98], [0, 3, 4, 16, 20]),
        ([BOS, BOS, BOS], [0, 3, 6]),
        # A character of two tokens begins where both do.
        ([0xC3, 0xA9, EOS], [0, 0, 1]),
    ],
)
def test_offsets_index_the_echoed_text(
    server: RunningServer, prompt: Any, offsets: list[int]
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 3, "ignore_eos": True}
    [choice] = server.post(COMPLETION, body).json["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    assert logprobs["text_offset"][: len(offsets)] == offsets
    echoed = prompt if isinstance(prompt, str) else server.engine.tokenizer.decode(prompt, False)
    assert text.startswith(echoed)
    assert logprobs["text_offset"][len(offsets)] == len(echoed)
    assert "".join(logprobs["tokens"][len(offsets) :]) == text[len(echoed) :]


def test_offsets_in_a_prompt_that_was_cut(server: RunningServer) -> None:
    body = {"prompt": "ab<|im_end|>c", "echo": True, "logprobs": 0, "max_tokens": 0}
    for most, text, offsets in (
        (3, "b<|im_end|>c", [0, 1, 11]),
        (5, "ab<|im_end|>c", [0, 0, 1, 2, 12]),
        (-1, "ab<|im_end|>c", [0, 0, 1, 2, 12]),
    ):
        answer = server.post(COMPLETION, {**body, "truncate_prompt_tokens": most}).json
        [choice] = answer["choices"]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        # A space before the first word, which the text has not.
        ("Hello world", [" Hello", " world"], [0, 5]),
        # Special tokens that take in the blanks beside them.
        ("a  <x>  b", ["a", "<x>", "b"], [0, 3, 8]),
        ("a <x>", ["<s>", "a", "<x>", "</s>"], [0, 0, 2, 5]),
        # A tokenizer that writes small letters only.
        ("ÀB c", ["à", "b", " c"], [0, 1, 2]),
        ("ab", ["abc", "d"], [0, 2]),
    ],
)
def test_offsets_of_texts_that_the_tokenizer_changed(
    text: str, tokens: list[str], offsets: list[int]
) -> None:
    entries = [TokenText(one, list(one.encode()), one.startswith("<")) for one in tokens]
    assert echo_offsets(text, entries) == offsets


def test_the_chosen_token_is_the_first_of_its_alternatives() -> None:
    names = {1: "a", 2: "b", 3: "c"}
    texts = {i: TokenText(name, list(name.encode()), False) for i, name in names.items()}
    # Not among the best, the second of them, and with a name that another has too.
    positions = [
        [(3, -9.0, 7), (1, -0.1, 1), (2, -2.0, 2)],
        [(2, -2.0, 2), (1, -0.1, 1), (2, -2.0, 2)],
        [(3, -math.inf, 9), (1, -0.1, 1), (2, -2.0, 2)],
    ]
    writer = CompletionLogprobs(texts, 2, False)  # type: ignore[arg-type]
    top = writer.push(positions)["top_logprobs"]
    assert [list(entry.items()) for entry in top] == [
        [("c", -9.0), ("a", -0.1), ("b", -2.0)],
        [("b", -2.0), ("a", -0.1)],
        [("c", LEAST_LOGPROB), ("a", -0.1), ("b", -2.0)],
    ]
    texts[3] = texts[1]
    writer = CompletionLogprobs(texts, 1, False)  # type: ignore[arg-type]
    assert writer.push(positions[:1])["top_logprobs"] == [{"a": -0.1}]


def test_keys_that_vllm_s_clients_read_are_always_there(server: RunningServer) -> None:
    [choice] = server.post(COMPLETION, {"prompt": "x"}).json["choices"]
    for key in ("logprobs", "stop_reason", "prompt_logprobs", "prompt_token_ids", "token_ids"):
        assert choice[key] is None
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": "x"}]}).json
    for key in ("prompt_logprobs", "prompt_token_ids"):
        assert answer[key] is None
    [choice] = answer["choices"]
    for key in ("logprobs", "stop_reason", "token_ids"):
        assert choice[key] is None
    for key in ("refusal", "annotations", "audio", "function_call", "reasoning"):
        assert choice["message"][key] is None
    assert choice["message"]["tool_calls"] == []


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_prompt_logprobs(server: RunningServer, path: str) -> None:
    if path == CHAT:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "né"}]}
    else:
        body = {"prompt": ["né", "x"], "n": 2}
    answer = server.post(path, {**body, "prompt_logprobs": 2, "max_tokens": 3}).json
    found = (
        [answer["prompt_logprobs"]]
        if path == CHAT
        else [choice["prompt_logprobs"] for choice in answer["choices"][::2]]
    )
    assert len(found) == len(server.engine.submitted)
    for entries, (prompt_ids, _, _) in zip(found, server.engine.submitted, strict=True):
        assert entries[0] is None
        assert len(entries) == len(prompt_ids)
        for token_id, entry in zip(prompt_ids[1:], entries[1:], strict=True):
            assert len(entry) == 2
            assert entry[str(token_id)]["logprob"] == -0.25
            assert entry[str(token_id)]["rank"] == 1
            assert set(entry[str(token_id)]) == {"logprob", "rank", "decoded_token"}


def test_prompt_logprobs_beside_echo_keep_their_own_width(server: RunningServer) -> None:
    body = {"prompt": "abc", "echo": True, "max_tokens": 0}
    answer = server.post(COMPLETION, {**body, "logprobs": 1, "prompt_logprobs": 4}).json
    [choice] = answer["choices"]
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {4}
    answer = server.post(COMPLETION, {**body, "prompt_logprobs": 0}).json
    [choice] = answer["choices"]
    assert choice["logprobs"] is None
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {1}


def test_silence_is_filled_with_comments(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "HEAD_WAIT_S", 0.05)
    server = start_server(sse_keep_alive_interval=0.1)
    server.engine.hold = True
    with server.socket() as sock:
        send(sock, COMPLETION, {"prompt": "x", "stream": True, "max_tokens": 200})
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        data = b""
        while data.count(b": ping\n\n") < 3:
            data += sock.recv(4096)
        assert b"data:" not in data
        server.engine.hold = False
        while b"[DONE]" not in data:
            data += sock.recv(4096)
    assert b'"finish_reason":"stop"' in data


def send(sock: Any, path: str, body: Any) -> None:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    sock.sendall(head.encode() + payload)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold", [True, False])
def test_a_client_that_leaves_is_aborted(server: RunningServer, stream: bool, hold: bool) -> None:
    server.engine.hold = hold
    server.engine.delay_s = 0.0 if hold else 0.2
    with server.socket() as sock:
        body = {"prompt": ["x", "y"], "n": 2, "stream": stream, "ignore_eos": True}
        send(sock, COMPLETION, {**body, "max_tokens": 400})
        eventually(lambda: len(server.engine.running) == 4)
        if stream and not hold:
            assert sock.recv(4096)
    began = time.monotonic()
    eventually(lambda: not server.engine.running)
    assert time.monotonic() - began < 1
    assert sorted(server.engine.aborted) == [0, 1, 2, 3]
    eventually(lambda: server.get("/load").json == {"server_load": 0})
    server.engine.hold, server.engine.delay_s = False, 0.0
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200


def test_a_client_that_leaves_while_it_sends(server: RunningServer) -> None:
    with server.socket() as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    assert server.post(COMPLETION, {"prompt": "x"}).status == 200
    assert len(server.engine.submitted) == 1


def test_a_slow_reader_loses_nothing(server: RunningServer) -> None:
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": 500, "seed": 9, "n": 100}
    expected = server.post(CHAT, chat(body)).json
    with server.socket() as sock:
        send(sock, CHAT, chat({**body, "stream": True}))
        time.sleep(0.3)
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(65536)
    chunks = events(dechunk(data.partition(b"\r\n\r\n")[2]))
    assert join(chunks, True) == plain(expected, True)


def chat(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    rest = {key: value for key, value in body.items() if key != "prompt"}
    return {**rest, "messages": [{"role": "user", "content": prompt}]}


def dechunk(data: bytes) -> bytes:
    whole = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        whole += data[:length]
        data = data[length + 2 :]
    return whole


def test_two_requests_on_one_connection(server: RunningServer) -> None:
    with server.socket() as sock:
        for _ in range(2):
            send(sock, COMPLETION, {"prompt": "x", "stream": True})
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += sock.recv(65536)
            assert b"[DONE]" in data
    assert server.engine.aborted == []


def test_priority_and_salt_reach_the_engine(start_server: StartServer) -> None:
    server = start_server(FakeEngine())
    server.post(COMPLETION, {"prompt": "x", "priority": -3, "cache_salt": "s"})
    options = server.engine.submitted[0][2]
    assert (options["priority"], options["cache_salt"]) == (-3, "s")


def test_defaults_of_the_model_yield_to_the_request(server: RunningServer) -> None:
    server.engine.generation_defaults = {"temperature": 0.6, "top_k": 20}
    server.post(CHAT, chat({"prompt": "x", "temperature": 0}))
    params = server.engine.submitted[0][1]
    assert (params.temperature, params.top_k, params.max_tokens) == (0, 20, None)


# ----------------------------------------------------------------- the operator's own choices


def test_silence_may_stay_silent(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "HEAD_WAIT_S", 0.05)
    server = start_server(sse_keep_alive_interval=0)
    server.engine.hold = True
    with server.socket() as sock:
        send(sock, COMPLETION, {"prompt": "x", "stream": True, "max_tokens": 2})
        data = sock.recv(4096)
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            data += sock.recv(4096)
        server.engine.hold = False
        sock.settimeout(5)
        while b"[DONE]" not in data:
            data += sock.recv(4096)
    assert b"ping" not in data


@pytest.mark.parametrize("asked", [None, {"include_usage": False}, {"include_usage": True}])
def test_usage_may_be_forced(start_server: StartServer, asked: Any) -> None:
    server = start_server(enable_force_include_usage=True)
    body = {"prompt": "x", "stream": True, "max_tokens": 3, "stream_options": asked}
    found = events(server.post(COMPLETION, body).body)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts[-2:] == [3, 3]
    assert found[-1]["choices"] == []
    whole = server.post(COMPLETION, {"prompt": "x", "max_tokens": 3})
    assert whole.json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("asked", "as_ids"), [(None, True), (False, False), (True, True)])
def test_tokens_may_be_named_by_id(start_server: StartServer, asked: Any, as_ids: bool) -> None:
    server = start_server(return_tokens_as_token_ids=True)
    body = {"prompt": "x", "max_tokens": 3, "logprobs": 1, "return_tokens_as_token_ids": asked}
    tokens = server.post(COMPLETION, body).json["choices"][0]["logprobs"]["tokens"]
    assert [token.startswith("token_id:") for token in tokens] == [as_ids] * 3
