"""examples/monitoring: the dashboard asks for metrics that there are, and a real Prometheus agrees."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import RunningServer, tiny_server
from prometheus_client.parser import text_string_to_metric_families

from octavo.metric_names import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "examples" / "monitoring"
DASHBOARD = json.loads((EXAMPLES / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

# What the dashboard in vLLM's own repository asks for, each by the label model_name.
VLLM_DASHBOARD = """
e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum e2e_request_latency_seconds_count
prompt_tokens_total generation_tokens_total inter_token_latency_seconds_bucket
inter_token_latency_seconds_sum inter_token_latency_seconds_count num_requests_running
num_requests_waiting time_to_first_token_seconds_bucket time_to_first_token_seconds_sum
time_to_first_token_seconds_count kv_cache_usage_perc request_prompt_tokens_bucket
request_generation_tokens_bucket request_success_total request_queue_time_seconds_sum
request_prefill_time_seconds_sum request_decode_time_seconds_sum
request_max_num_generation_tokens_sum
"""

TOOL = {"name": "f", "input_schema": {"type": "object"}}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = tiny_server(tmp_path_factory.mktemp("model"), context=1024)
    for _ in range(3):
        body = {"prompt": "x", "max_tokens": 7, "ignore_eos": True}
        assert server.post("/v1/completions", body).status == 200
    assert server.post("/v1/completions", {"prompt": "x" * 2000}).status == 400
    messages = [{"role": "user", "content": "x"}]
    # An agent's prompt, and an answer that may call.
    agents = {"model": "m", "max_tokens": 1, "messages": messages, "tools": [TOOL]}
    assert server.post("/v1/messages", agents).status == 200
    yield server
    server.stop()


NAME = re.compile(r"\b(?:(?:vllm|octavo):|process_)\w+")


def samples(server: RunningServer) -> dict[str, set[str]]:
    """The labels of every sample's name."""
    text = server.get("/metrics").body.decode()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_dashboard_asks_for_what_there_is(server: RunningServer) -> None:
    labels = samples(server)
    asked = {name for text in EXPRESSIONS for name in NAME.findall(text)}
    assert len(asked) > 30
    asked |= {f"vllm:{name}" for name in VLLM_DASHBOARD.split()}
    assert asked <= set(labels)
    assert all("model_name" in labels[n] for n in asked if not n.startswith("process_"))
    for expression in EXPRESSIONS:
        names = NAME.findall(expression)
        for label in re.findall(r"by \((\w+)\)", expression):
            assert all(label in labels[name] for name in names), expression


def test_the_dashboard_shows_every_metric(server: RunningServer) -> None:
    text = server.get("/metrics").body.decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    rows = (*GAUGES, *COUNTERS, *HISTOGRAMS)
    families -= {row.prefix + alias for row in rows for alias in row.aliases}
    shown = " ".join(EXPRESSIONS)
    assert [name for name in sorted(families) if not re.search(rf"\b{name}", shown)] == []


def test_the_dashboard_s_panels_have_places_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) >= 12
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(places) == len(set(places))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)(\w+)", " ".join(EXPRESSIONS)))
    assert used <= variables


@needs_prometheus
def test_the_scrape_example_is_valid() -> None:
    command = ["promtool", "check", "config", str(EXAMPLES / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_metrics_are_well_formed(server: RunningServer) -> None:
    text = server.get("/metrics").body
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    # Status 3: well-formed, with names that are not to promtool's taste; they are vLLM's.
    assert done.returncode in (0, 3), done.stderr


@pytest.fixture
def prometheus(server: RunningServer, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the server, from the example but for the port."""
    config = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


def ask(url: str, expression: str) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as response:
        answer = json.load(response)
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


@needs_prometheus
@pytest.mark.slow
def test_prometheus_reads_what_was_sent(server: RunningServer, prometheus: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            # Rates need two samples.
            scrapes = ask(prometheus, 'count_over_time(up{job="octavo"}[1m])')
        except OSError:
            scrapes = []
        if scrapes and int(scrapes[0]["value"][1]) >= 3:
            break
        assert time.monotonic() < deadline, "Prometheus has not scraped"
        time.sleep(0.3)
    assert ask(prometheus, 'up{job="octavo"}')[0]["value"][1] == "1"

    def value(expression: str) -> float:
        [result] = ask(prometheus, expression)
        return float(result["value"][1])

    assert value("vllm:generation_tokens_total") == 3 * 7 + 1
    assert value('vllm:request_success_total{finished_reason="length"}') == 4
    assert value("vllm:time_to_first_token_seconds_count") == 4
    assert value("vllm:inter_token_latency_seconds_count") == 18
    assert value('vllm:admission_rejections_total{reason="context_length_exceeded"}') == 1
    for expression in EXPRESSIONS:
        for name, text in (("job", "octavo"), ("model", ".*"), ("__rate_interval", "1m")):
            expression = expression.replace(f"${name}", text)
        assert ask(prometheus, expression), expression
