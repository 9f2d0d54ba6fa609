"""/metrics as Prometheus reads it, and the small routes."""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually
from prometheus_client.parser import text_string_to_metric_families

from octavo import __version__
from octavo.server import stats_log


def samples(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = server.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


LABELS = {("model_name", "fake/model"), ("engine", "0")}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(LABELS | set(labels.items()))


def test_names_labels_and_aliases(server: RunningServer) -> None:
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    server.post("/v1/completions", {"prompt": "x", "stop_token_ids": list(range(256))})
    found = samples(server)
    assert found[key("vllm:request_success_total", finished_reason="length")] == 1
    assert found[key("vllm:request_success_total", finished_reason="stop")] == 1
    assert found[key("vllm:generation_tokens_total")] == server.engine.num_tokens
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert found[key(f"vllm:{name}")] == 0
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert found[key(f"vllm:{name}_bucket", le="0.001")] == 2
        assert found[key(f"vllm:{name}_bucket", le="+Inf")] == 6
        assert found[key(f"vllm:{name}_count")] == 6
        assert found[key(f"vllm:{name}_sum")] == 0.05
    assert found[key("octavo:step_seconds_count", phase="launch")] == 1
    assert found[key("octavo:step_seconds_sum", phase="launch")] == 0.01
    assert found[key("octavo:step_seconds_bucket", phase="launch", le="0.01")] == 1
    assert found[key("octavo:step_seconds_bucket", phase="launch", le="0.005")] == 0
    [labels] = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert labels["kv_cache_size_tokens"] == "4096"
    assert float(labels["kv_cache_max_concurrency"]) == 4096 / server.engine.max_model_len


def test_gauges_follow_what_runs(server: RunningServer) -> None:
    server.engine.hold = True
    post = threading.Thread(target=lambda: server.post("/v1/completions", {"prompt": "x", "n": 2}))
    post.start()
    eventually(lambda: samples(server)[key("vllm:num_requests_running")] == 2)
    server.engine.hold = False
    post.join(10)
    assert samples(server)[key("vllm:num_requests_running")] == 0


def test_rejections_are_counted(server: RunningServer) -> None:
    server.engine.max_unfinished = 0
    for _ in range(2):
        server.post("/v1/completions", {"prompt": "x"})
    name = "vllm:admission_rejections_total"
    assert samples(server)[key(name, reason="queue_full")] == 2


def test_version(server: RunningServer) -> None:
    assert server.get("/version").json == {"version": __version__}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_balancer_s_report_of_the_load(server: RunningServer, path: str) -> None:
    body: dict[str, Any] = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body.pop("messages" if path == "/v1/completions" else "prompt")

    def report(form: str | None) -> str | None:
        headers = {} if form is None else {"Endpoint-Load-Metrics-Format": form}
        answer = server.request("POST", path, body, headers)
        assert answer.status == 200
        found: str | None = answer.headers.get("endpoint-load-metrics")
        return found

    assert report(None) is report("XML") is None
    waiting = "named_metrics.num_requests_waiting=0.0"
    assert report("TEXT") == f"TEXT named_metrics.kv_cache_usage_perc=0.0, {waiting}"
    kind, _, text = (report("json") or "").partition(" ")
    named = {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0.0}
    assert (kind, json.loads(text)) == ("JSON", {"named_metrics": named})


def test_tokenize(server: RunningServer) -> None:
    answer = server.post("/tokenize", {"prompt": "né", "return_token_strs": True})
    assert answer.json == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [256, 110, 195, 169],
        "token_strs": ["<s>", "n", "\u00c3", "\u00a9"],
    }
    answer = server.post("/tokenize", {"prompt": "n", "add_special_tokens": False})
    assert answer.json["tokens"] == [110]
    messages = [{"role": "user", "content": "x"}]
    tokens = server.post("/tokenize", {"messages": messages}).json["tokens"]
    server.post("/v1/chat/completions", {"messages": messages})
    assert server.engine.submitted[0][0] == tokens
    for body in ({}, {"prompt": "x", "messages": messages}, {"prompt": 1}, {"tokens": [1]}):
        assert server.post("/tokenize", body).status == 400
    assert server.post("/tokenize", {"prompt": "x", "model": "other"}).status == 404


def test_tokenizer_info(start_server: StartServer) -> None:
    server = start_server()
    assert server.get("/tokenizer_info").status == 404
    server = start_server(enable_tokenizer_info_endpoint=True, chat_template="{{ messages }}")
    info = server.get("/tokenizer_info").json
    assert info == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": server.engine.max_model_len,
        **server.engine.special_tokens,
        "chat_template": "{{ messages }}",
    }
    assert "/tokenizer_info" in server.get("/openapi.json").json["paths"]


def test_detokenize(server: RunningServer) -> None:
    answer = server.post("/detokenize", {"tokens": [256, 110, 195, 169, 257]})
    assert answer.json == {"prompt": "<s>né</s>"}
    for body in ({}, {"tokens": "x"}, {"tokens": [-1]}, {"tokens": [260]}):
        assert server.post("/detokenize", body).error["param"] == "tokens"


@pytest.mark.parametrize("disable_log_stats", [False, True])
def test_throughput_is_logged_unless_told_not_to(
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disable_log_stats: bool,
) -> None:
    monkeypatch.setattr(stats_log, "INTERVAL_S", 0.05)
    caplog.set_level(logging.INFO)
    server = start_server(disable_log_stats=disable_log_stats)
    server.post("/v1/completions", {"prompt": "x", "max_tokens": 100, "ignore_eos": True})

    def is_logged() -> bool:
        return any("tok/s" in record.getMessage() for record in caplog.records)

    if disable_log_stats:
        time.sleep(0.2)
        assert not is_logged()
    else:
        eventually(is_logged)


@pytest.mark.parametrize("enable_log_requests", [False, True])
def test_requests_are_logged_on_demand_without_their_text(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, enable_log_requests: bool
) -> None:
    caplog.set_level(logging.INFO)
    server = start_server(enable_log_requests=enable_log_requests)
    body = {"prompt": "a secret", "max_tokens": 1}
    server.post("/v1/completions", body, {"X-Request-Id": "good-one"})
    server.post("/v1/completions", {**body, "top_p": 7}, {"X-Request-Id": "bad-one"})
    if not enable_log_requests:
        assert "-one" not in caplog.text
        return
    eventually(lambda: sum("-one" in record.getMessage() for record in caplog.records) == 2)
    lines = [record.getMessage() for record in caplog.records if "-one" in record.getMessage()]
    assert [line.split()[:3] for line in lines] == [
        ["POST", "/v1/completions", "200"],
        ["POST", "/v1/completions", "400"],
    ]
    assert "secret" not in caplog.text
