"""Thousands of bad requests: none is a 500, none hangs, and nothing is left of them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from harness import RunningServer, eventually, tiny_server
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from octavo.server.anthropic import protocol as anthropic_protocol
from octavo.server.openai import protocol
from octavo.server.responses import protocol as responses_protocol
from octavo.server.routes import ROUTES

NUM_EXAMPLES, PER_EXAMPLE, NUM_BAD = 230, 25, 5000

MESSAGES = [{"role": "user", "content": "Say."}]
# Enough to pass, so that what is wrong is what was put in.
MESSAGES_PATH, COUNT_PATH = "/v1/messages", "/v1/messages/count_tokens"
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"input": "x"},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "m", "messages": MESSAGES},
}
PATHS = [entry.path.replace("{name:path}", "octavo") for entry in ROUTES]
FIELDS = sorted(
    {*protocol.CHAT_FIELDS, *protocol.COMPLETION_FIELDS, *protocol.TOKENIZE_FIELDS}
    | {*protocol.CHAT_BODY.refused, *protocol.COMPLETION_BODY.refused}
    | {*responses_protocol.RESPONSES_BODY.fields, *anthropic_protocol.MESSAGES_BODY.fields}
    | {"tokens", "role", "no_such_field"}
)
KEYS = ("role", "content", "type", "text", "5", "tool_calls", "x", "id", "name", "input", "call_id")
KEYS += ("output", "arguments", "source", "data", "tool_use_id", "thinking", "encrypted_content")
KEYS += ("format", "schema", "effort", "budget_tokens", "input_schema", "parameters", "tools")
# What decides about the other members of an object.
TYPES = ("text", "image", "document", "tool_use", "tool_result", "thinking", "message", "reasoning")
TYPES += ("function", "custom", "namespace", "function_call", "function_call_output", "json_schema")
TYPES += ("item_reference", "enabled", "adaptive", "any", "tool", "grammar", "user", "assistant")

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, -(2**31), 2**63, 2**64, -(2**63) - 1, 10**40]),
    st.sampled_from([0.5, -0.5, 1e-320, 1e308, -1e308, 1e400, 3.0]),
    st.integers(-5, 200),
    st.text(max_size=8),
    st.sampled_from(TYPES),
    st.sampled_from(["", "x" * 2000, "\x00", "\ud800", "</s>", "{{ 7*7 }}", "{% for %}", "🦊"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
DEEP = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900, b'{"prompt":' + b"[" * 100_000]
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """A valid body with some of its fields wrong, or bytes that are no body at all."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        return draw(DEEP)
    body: Any = dict(VALID.get(path, {}))
    for name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        body[name] = draw(VALUES)
    if kind == 2:
        body = draw(VALUES)
    text = encoded(body)
    if kind == 3:
        at = draw(st.integers(0, len(text)))
        return text[:at] + draw(st.sampled_from([b"", b"\xff", b"\x00", b"NaN", b'"'])) + text[at:]
    if kind == 4:
        return text[: draw(st.integers(0, len(text)))]
    return text


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers)."""
    path = draw(st.sampled_from([*list(VALID) * 6, *PATHS]))
    if draw(st.integers(0, 30)) == 0:
        path += draw(st.sampled_from(["/", "%00", "//x", "/../x", "?a=%ff", "%2e%2e", "x"]))
    method = "POST"
    if draw(st.integers(0, 15)) == 0:
        method = draw(st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "FOO"]))
    headers = {"Content-Type": "application/json"}
    if draw(st.integers(0, 15)) == 0:
        headers["Content-Type"] = draw(
            st.sampled_from(
                [
                    "",
                    "text/plain",
                    "application/json; charset=utf-16",
                    "multipart/form-data",
                    "\xe9",
                ]
            )
        )
    if draw(st.integers(0, 15)) == 0:
        name = draw(
            st.sampled_from(["X-Request-Id", "Authorization", "Accept", "Origin", "Expect"])
        )
        headers[name] = draw(st.sampled_from(["", "\xff\xfe", "x" * 5000, "Bearer ", "*/*, ;;"]))
    return method, path, draw(bodies(path)), headers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = tiny_server(tmp_path_factory.mktemp("model"))
    yield server
    server.stop()


class Fuzzer:
    """Sends requests over one connection and judges the answers."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._connection: http.client.HTTPConnection | None = None
        self.statuses: Counter[int] = Counter()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                "127.0.0.1", self._server.port, timeout=20
            )
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.will_close:
            self._connection.close()
            self._connection = None
        status = response.status
        self.statuses[status] += 1
        assert status in {200, 400, 404, 405, 408, 413, 415, 431}, answer
        assert response.headers["x-request-id"]
        if method == "HEAD":
            assert answer == b""
        elif status != 200:
            error = json.loads(answer)["error"]
            keys = {"message", "type", "param", "code"}
            # A head that is no HTTP has no path, whose API's form it could have.
            is_known = method != "FOO" and status not in (408, 431)
            if is_known and path.partition("?")[0] in (MESSAGES_PATH, COUNT_PATH):
                keys = {"message", "type"}
            assert set(error) - {"details"} == keys
            assert 0 < len(error["message"]) <= 1024
            assert "Traceback" not in error["message"]
            assert "/python/" not in error["message"]
        elif response.headers["content-type"].startswith("text/event-stream"):
            last = {"/v1/messages": b"event: message_stop", "/v1/responses": b'"response":{"id":'}
            assert (
                last.get(path, b"data: [DONE]") in answer.removesuffix(b"\n\n").split(b"\n\n")[-1]
            )
            assert b"event: error" not in answer
            assert b'"error":{' not in answer


def counts(server: RunningServer) -> tuple[int, int]:
    """The server's asyncio tasks, and this process's file descriptors."""
    return len(asyncio.all_tasks(server._loop)), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_bad_requests_do_no_harm(server: RunningServer) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True}

    def answer() -> Any:
        response = server.post("/v1/completions", {**body, "return_token_ids": True})
        assert response.status == 200
        return response.json["choices"][0]["token_ids"]

    before = answer()
    eventually(lambda: server.get("/load").json == {"server_load": 0})
    idle = counts(server)
    fuzzer = Fuzzer(server)

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(requests(), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def fuzz(batch: list[tuple[str, str, bytes, dict[str, str]]]) -> None:
        for request in batch:
            fuzzer.send(*request)

    fuzz()
    fuzzer.close()
    num_bad = sum(count for status, count in fuzzer.statuses.items() if status != 200)
    assert num_bad >= NUM_BAD, fuzzer.statuses
    assert {200, 400, 404, 405, 415} <= set(fuzzer.statuses)
    metrics = server.engine.metrics
    eventually(lambda: metrics.snapshot()["num_requests_running"] == 0)
    snapshot = metrics.snapshot()
    assert snapshot["num_requests_waiting"] == 0
    assert snapshot["kv_cache_usage_perc"] == 0
    assert server.get("/load").json == {"server_load": 0}
    assert answer() == before
    # Nothing is left of any: a connection that has just been closed may take a moment.
    eventually(lambda: all(now <= then for now, then in zip(counts(server), idle, strict=True)))
    assert server.get("/health").status == 200
