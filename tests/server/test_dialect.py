"""A third API costs one file: this one holds a toy dialect, and drives it through the server.

JSON lines in place of server-sent events, errors of a form of their own, and nothing of OpenAI's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from harness import RunningServer, StartServer, eventually
from test_core_streams import start_core_server, tokenizer  # noqa: F401 (fixtures)
from test_streams import dechunk, send

from octavo._core import SseTemplate, TokenIds
from octavo.errors import error_kind, error_message
from octavo.prompt_logprobs import PromptLogprobs
from octavo.server import lifecycle
from octavo.server.http import fields
from octavo.server.http.body import Body
from octavo.server.http.exchange import Exchange
from octavo.server.routes import ROUTES, Entry, make_app
from octavo.server.work import answer as answer_module
from octavo.server.work.answer import answer
from octavo.server.work.chat import PLAIN
from octavo.server.work.dialect import Dialect
from octavo.server.work.news import News
from octavo.server.work.prompts import encode
from octavo.server.work.request import GenerationRequest
from octavo.server.work.served_model import ServedModel
from octavo.server.work.state import ServerState
from octavo.server.work.usage import Usage

# ------------------------------------------------------------------------------------- the dialect

BODY = Body(
    {
        "say": fields.string(),
        "times": fields.integer(1, 9),
        "most": fields.integer(0),
        "seed": fields.integer(),
        "live": fields.boolean,
        "count": fields.boolean,
    },
    required=("say",),
)


class ToyRequest(GenerationRequest):
    say: str
    # Each line tells how many tokens it stands for: more than the core's templates can hold.
    counts: bool


class ToyDialect:
    media_type = "application/jsonl"
    ping = early_ping = b"\n"

    def parse(self, body: Mapping[str, Any]) -> ToyRequest:
        clean = BODY.clean(body)
        named = {"n": "times", "max_tokens": "most", "seed": "seed"}
        sampling = {to: clean[name] for to, name in named.items() if name in clean}
        sampling.setdefault("ignore_eos", True)
        request = ToyRequest(sampling=sampling, stream=clean.get("live", False))
        request.say, request.counts = clean["say"], clean.get("count", False)
        return request

    async def reply(self, request: ToyRequest, model: ServedModel, request_id: str) -> ToyReply:
        return ToyReply(request, [await encode(model.engine, request.say, False, "say")])

    def error_body(self, error: BaseException, request_id: str | None = None) -> bytes:
        return line(oops=error_message(error, request_id), status=error_kind(error).status)


class ToyReply:
    prompt_field = "say"

    def __init__(self, request: ToyRequest, prompts: Sequence[TokenIds]) -> None:
        self.request = request
        self.prompts = prompts
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = PLAIN

    def templates(self) -> list[SseTemplate] | None:
        import octavo._core

        if self.request.counts:
            return None
        return [
            octavo._core.SseTemplate(b'{"n":%d,"text":"' % index, b'"}\n', self.start(index))
            for index in range(self.request.n)
        ]

    def start(self, index: int) -> bytes:
        return line(n=index, begins=True)

    def text(self, index: int, news: News) -> bytes:
        more = {"tokens": len(news.token_ids)} if self.request.counts else {}
        return line(n=index, text=news.text, **more)

    def end(self, index: int, news: News) -> bytes:
        rest = self.text(index, news) if news.text or self.request.counts else b""
        return rest + line(n=index, ends=news.finish_reason)

    def close(self, usage: Usage) -> bytes:
        return line(cost=usage.to_object()["total_tokens"])

    def error(self, error: BaseException) -> bytes:
        return TOY.error_body(error)

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        said = [one.text for one in news]
        ends = [one.finish_reason for one in news]
        return line(said=said, ends=ends, cost=usage.to_object()["total_tokens"])


def line(**value: Any) -> bytes:
    return orjson.dumps(value) + b"\n"


TOY: Dialect[ToyRequest] = ToyDialect()


async def toy(state: ServerState, exchange: Exchange) -> None:
    """Say something."""
    await answer(TOY, state, exchange)


ENTRY = Entry("/toy", ("POST",), toy, BODY, admits=True, error_body=TOY.error_body)

# --------------------------------------------------------------------------------------- its tests


@pytest.fixture
def start_toy(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> StartServer:
    monkeypatch.setattr(lifecycle, "make_app", lambda state: make_app(state, [*ROUTES, ENTRY]))
    return start_server


@pytest.fixture
def server(start_toy: StartServer) -> RunningServer:
    return start_toy()


def lines(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n")
    return [json.loads(one) for one in body.splitlines() if one]


def joined(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's lines as the whole answer has them."""
    *parts, last = stream
    num = 1 + max(part["n"] for part in parts)
    said, ends = [""] * num, [None] * num
    begun = set()
    for part in parts:
        if "begins" in part:
            begun.add(part["n"])
            continue
        assert part["n"] in begun
        assert ends[part["n"]] is None, "nothing follows the end"
        said[part["n"]] += part.get("text", "")
        ends[part["n"]] = part.get("ends")
    return {"said": said, "ends": ends, **last}


@pytest.mark.parametrize("most", [0, 1, 60])
@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(
    server: RunningServer, most: int, count: bool, times: int
) -> None:
    body = {"say": "naïve", "seed": 7, "most": most, "times": times, "count": count}
    whole = server.post("/toy", body)
    assert whole.status == 200
    assert whole.headers["content-type"] == "application/json"
    assert len(whole.json["said"]) == times
    streamed = server.post("/toy", {**body, "live": True})
    assert streamed.headers["content-type"] == "application/jsonl"
    assert b"data:" not in streamed.body
    found = lines(streamed.body)
    assert joined(found) == whole.json
    if most:
        delivery = server.engine.submitted[-1][2]["delivery"]
        assert delivery == ("delta" if count else "sse")
        assert sum(part.get("tokens", 0) for part in found) == most * times * count


def test_the_core_writes_its_lines(
    start_core_server: StartServer,  # noqa: F811
    start_toy: StartServer,
) -> None:
    server = start_core_server()
    body = {"say": "x", "most": 60, "times": 2}
    whole = server.post("/toy", body).json
    assert any(whole["said"])
    assert joined(lines(server.post("/toy", {**body, "live": True}).body)) == whole


def test_every_error_on_its_route_has_its_form(start_toy: StartServer) -> None:
    server = start_toy(api_key=("k",))
    key = {"x-api-key": "k"}

    def found(method: str, body: Any, headers: dict[str, str]) -> tuple[int, int]:
        answer = server.request(method, "/toy", body, headers)
        assert set(answer.json) == {"oops", "status"}, answer.body
        assert answer.headers["content-type"] == "application/json"
        return answer.status, answer.json["status"]

    assert found("POST", {"say": "x"}, {}) == (401, 401)
    assert found("POST", {"say": 1}, key) == (400, 400)
    assert found("POST", {"says": "x"}, key) == (400, 400)
    assert found("POST", b"{", key) == (400, 400)
    assert found("POST", {"say": "x" * 600}, key) == (400, 400)
    assert found("POST", {"say": "x"}, {**key, "Content-Type": "text/plain"}) == (415, 415)
    assert found("GET", None, key) == (405, 405)
    assert found("GET", None, {**key, "X-Filler": "y" * 20_000}) == (431, 431)
    # Elsewhere it is OpenAI's.
    assert server.request("POST", "/toys", {}, key).error["code"] == "not_found"
    assert server.request("POST", "/v1/completions", {}, key).error["param"] == "prompt"
    assert server.get("/v1/models", X_Filler="y" * 20_000).error["code"] == "header_too_large"


def test_a_refused_preflight_has_its_form(start_toy: StartServer) -> None:
    server = start_toy(allowed_origins=("https://page.example",))
    preflight = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    answer = server.request("OPTIONS", "/toy", headers=preflight)
    assert answer.status == answer.json["status"] == 400
    assert "error" in server.request("OPTIONS", "/v1/completions", headers=preflight).json


@pytest.mark.parametrize("live", [False, True])
def test_an_error_before_the_first_byte_has_a_status(server: RunningServer, live: bool) -> None:
    server.engine.fail_after = 0
    answer = server.post("/toy", {"say": "x", "live": live})
    assert answer.status == answer.json["status"] == 500
    assert answer.headers["x-request-id"] in answer.json["oops"]


@pytest.mark.parametrize("count", [False, True])
def test_an_error_after_the_first_byte_is_a_line(server: RunningServer, count: bool) -> None:
    server.engine.delay_s = 0.05
    with server.socket() as sock:
        send(sock, "/toy", {"say": "x", "live": True, "count": count})
        data = sock.recv(65536)
        while b'"text"' not in data:
            data += sock.recv(65536)
        server.call(server.engine.die)
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(65536)
    last = lines(dechunk(data.partition(b"\r\n\r\n")[2]))[-1]
    assert (last["status"], set(last)) == (503, {"oops", "status"})


@pytest.mark.parametrize("live", [False, True])
def test_a_client_that_leaves_is_aborted(server: RunningServer, live: bool) -> None:
    server.engine.delay_s = 0.2
    with server.socket() as sock:
        send(sock, "/toy", {"say": "x", "live": live, "times": 2})
        eventually(lambda: len(server.engine.running) == 2)
        if live:
            assert sock.recv(4096)
    began = time.monotonic()
    eventually(lambda: not server.engine.running)
    assert time.monotonic() - began < 1
    assert sorted(server.engine.aborted) == [0, 1]
    eventually(lambda: server.get("/load").json == {"server_load": 0})


def test_silence_is_filled_its_own_way(
    start_toy: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "HEAD_WAIT_S", 0.05)
    server = start_toy(sse_keep_alive_interval=0.1)
    server.engine.hold = True
    with server.socket() as sock:
        send(sock, "/toy", {"say": "x", "live": True})
        data = b""
        while data.count(b"1\r\n\n\r\n") < 3:
            data += sock.recv(4096)
        assert b"{" not in data.partition(b"\r\n\r\n")[2]


def test_its_refusals_are_counted_and_its_body_is_described(server: RunningServer) -> None:
    server.engine.max_unfinished = 1
    answer = server.post("/toy", {"say": "x", "times": 3})
    assert answer.json["status"] == 503
    assert answer.headers["retry-after"] == "1"
    assert 'reason="queue_full"' in server.get("/metrics").body.decode()
