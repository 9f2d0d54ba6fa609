"""The table of limits: its numbers, and each one met and passed by one.

The fields' own bounds are walked by test_openapi, which reads them from /openapi.json; here is what
no schema says: sizes of HTTP messages, templates and what they write.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from harness import RunningServer, StartServer, tiny_server

from octavo.config import EngineConfig
from octavo.errors import BadRequestError
from octavo.server.http import limits
from octavo.server.http.openapi import describe
from octavo.server.routes import ROUTES
from octavo.text import chat_template
from octavo.text.chat_template import ChatTemplate

pytestmark = pytest.mark.system

COMPLETION = "/v1/completions"
BODY = b'{"prompt":"x","max_tokens":1}'


def test_the_table() -> None:
    assert limits.MAX_BODY_BYTES == 32 << 20
    assert limits.MAX_HEADER_BYTES == 16 << 10
    assert limits.MAX_PROMPTS == 1024
    assert limits.MAX_N == 128
    assert (limits.MAX_STOP_STRINGS, limits.MAX_STOP_STRING_CHARS) == (16, 256)
    assert limits.MAX_BAD_WORDS == 128
    assert limits.MAX_LOGIT_BIAS == 1024
    assert limits.MAX_ALLOWED_TOKEN_IDS == 4096


def test_the_description_states_the_fields_bounds() -> None:
    """So that the walk along the description's edges is a walk along the table's."""
    document = json.dumps(describe(ROUTES, open_paths=None, root_path=""))
    for most in (
        limits.MAX_PROMPTS,
        limits.MAX_N,
        limits.MAX_STOP_STRINGS,
        limits.MAX_STOP_STRING_CHARS,
        limits.MAX_BAD_WORDS,
        limits.MAX_ALLOWED_TOKEN_IDS,
        limits.MAX_MESSAGES,
        limits.MAX_STOP_TOKEN_IDS,
        limits.MAX_REQUEST_ID_CHARS,
        limits.MAX_CACHE_SALT_CHARS,
    ):
        assert any(f'"{key}": {most}' in document for key in ("maxItems", "maxLength", "maximum"))
    assert f'"maxProperties": {limits.MAX_LOGIT_BIAS}' in document


def exchange(server: RunningServer, *parts: bytes) -> bytes:
    """What comes back first."""
    with server.socket() as sock:
        try:
            for part in parts:
                sock.sendall(part)
        except OSError:
            pass  # refused before all was sent
        return sock.recv(65536)


@pytest.mark.parametrize("past", [0, 1])
def test_bodies(server: RunningServer, past: int) -> None:
    answer = server.post(COMPLETION, BODY.ljust(limits.MAX_BODY_BYTES + past))
    assert answer.status == (413 if past else 200)
    if past:
        assert answer.error["code"] == "body_too_large"


@pytest.mark.parametrize("past", [0, 1])
def test_bodies_of_unknown_length(
    server: RunningServer, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_BODY_BYTES", 1000)
    body = BODY.ljust(1000 + past)
    head = (
        f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:500], body[500:])]
    for parts in ([b"".join((head.encode(), *chunks, b"0\r\n\r\n"))], [head.encode(), *chunks]):
        data = exchange(server, *parts, *([b"0\r\n\r\n"] if len(parts) > 1 else []))
        assert data.startswith(b"HTTP/1.1 413 " if past else b"HTTP/1.1 200 "), data


@pytest.mark.parametrize("past", [False, True])
def test_pauses_in_a_body(
    server: RunningServer, past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause has the whole limit: a body that keeps coming may take longer."""
    monkeypatch.setattr(limits, "MAX_BODY_SILENCE_S", 1.0)
    head = (
        f"POST {COMPLETION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\n\r\n"
    )
    began = time.monotonic()
    with server.socket() as sock:
        sock.sendall(head.encode())
        for at in range(0, len(BODY), 6):
            time.sleep(0.3)
            if past and at:
                break
            sock.sendall(BODY[at : at + 6])
        data = sock.recv(65536)
    assert data.startswith(b"HTTP/1.1 408 " if past else b"HTTP/1.1 200 "), data
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("past", [0, 1])
@pytest.mark.parametrize("splits", [False, True])
def test_heads(server: RunningServer, past: int, splits: bool) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Filler: "
    head = start.ljust(limits.MAX_HEADER_BYTES + past - 4, b"y") + b"\r\n\r\n"
    assert len(head) == 16384 + past
    data = exchange(server, *((head[:9000], head[9000:]) if splits else (head,)))
    assert data.startswith(b"HTTP/1.1 431 " if past else b"HTTP/1.1 200 "), data


@pytest.mark.parametrize("length", [limits.MAX_REQUEST_ID_CHARS, limits.MAX_REQUEST_ID_CHARS + 1])
def test_request_ids(server: RunningServer, length: int) -> None:
    """One that is too long is replaced: it is a header, not a field."""
    given = "r" * length
    answer = server.request("GET", "/version", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) == (length == limits.MAX_REQUEST_ID_CHARS)


def test_template_sizes() -> None:
    ChatTemplate("x" * chat_template.MAX_TEMPLATE_CHARS, {})
    with pytest.raises(ValueError, match="at most"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARS + 1), {})


def test_what_templates_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = ChatTemplate("{{ messages[0].content }}", {})

    def render(num_chars: int) -> str:
        message: dict[str, Any] = {"role": "user", "content": "x" * num_chars}
        return template.render([message])

    assert len(render(1000)) == 1000
    with pytest.raises(BadRequestError, match="writes too much"):
        render(1001)


@pytest.mark.parametrize("most", [0, 3, 50])
def test_logprobs_of_an_operator_s_own(start_server: StartServer, most: int) -> None:
    """``--max-logprobs`` is the bound, be it lower or higher than OpenAI's 20."""
    server = start_server(FakeEngine(EngineConfig(max_logprobs=most)))
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "max_tokens": 1}
    text = {"prompt": "x", "max_tokens": 1}
    for path, body, param in (
        ("/v1/chat/completions", chat, "top_logprobs"),
        ("/v1/chat/completions", chat, "prompt_logprobs"),
        (COMPLETION, text, "logprobs"),
        (COMPLETION, text, "prompt_logprobs"),
    ):
        assert server.post(path, {**body, param: most}).status == 200, param
        for past in (most + 1, -1, -2):
            answer = server.post(path, {**body, param: past})
            assert (answer.status, answer.error["param"]) == (400, param)


# The second is more than the tiny model's vocabulary.
@pytest.mark.parametrize("most", [-1, 100_000])
def test_logprobs_of_every_token(tmp_path: Path, most: int) -> None:
    """-1 where the operator allows it: the whole vocabulary's, which add up to one."""
    server = tiny_server(tmp_path, max_logprobs=most)
    try:
        size = server.engine.model_config.vocab_size
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        body = {**chat, "logprobs": True, "top_logprobs": -1}
        [choice] = server.post("/v1/chat/completions", body).json["choices"]
        for position in choice["logprobs"]["content"]:
            top = position["top_logprobs"]
            assert len(top) == size
            assert sum(math.exp(one["logprob"]) for one in top) == pytest.approx(1, abs=1e-3)
        body = {"prompt": [5, 6, 7], "max_tokens": 1, "logprobs": -1, "prompt_logprobs": 2}
        body |= {"echo": True, "return_tokens_as_token_ids": True}
        [choice] = server.post(COMPLETION, body).json["choices"]
        assert [len(one or ()) for one in choice["logprobs"]["top_logprobs"]] == [0] + [size] * 3
        assert {len(one) for one in choice["prompt_logprobs"][1:]} <= {2, 3}
        body = {**chat, "prompt_logprobs": -1}
        answer = server.post("/v1/chat/completions", body).json
        assert {len(one) for one in answer["prompt_logprobs"][1:]} == {size}
        answer = server.post("/v1/chat/completions", {**chat, "top_logprobs": -1})
        assert answer.error["param"] == "top_logprobs"
    finally:
        server.stop()


def test_samples_of_a_request(server: RunningServer) -> None:
    prompts = ["x"] * (limits.MAX_SAMPLES // limits.MAX_N)
    body = {"prompt": prompts, "n": limits.MAX_N, "max_tokens": 1}
    answer = server.post(COMPLETION, body)
    assert len(answer.json["choices"]) == limits.MAX_SAMPLES
    answer = server.post(COMPLETION, {**body, "prompt": [*prompts, "x"]})
    assert (answer.status, answer.error["param"]) == (400, "n")
