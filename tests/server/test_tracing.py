"""Traces: spans as a collector gets them, over a real engine; nothing without the flag."""

from __future__ import annotations

import concurrent.futures
import gzip
import http.server
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import RunningServer, StartServer, eventually, tiny_server

from octavo.server.http.config import ServerConfig
from octavo.server.work import tracing

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
collector_messages = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2",
    reason="opentelemetry-exporter-otlp is not installed",
)
pytestmark = pytest.mark.system

PROTOCOL, SHORT_PROTOCOL = tracing.PROTOCOL_VARIABLES
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
COMPLETION = {"prompt": "x", "max_tokens": 5, "ignore_eos": True, "temperature": 0.5}


class Told:
    """Spans, and headers of their requests, that a collector has been told."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        self.headers: dict[str, str] = {}

    def take(self, message: Any) -> None:
        for resource in message.resource_spans:
            self.resources.append(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


class Collector(Told):
    """A collector that is told by HTTP."""

    def __init__(self) -> None:
        super().__init__()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.headers.update(self.headers)
                outer.take(collector_messages.ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class GrpcCollector(Told):
    """A collector that is told by gRPC."""

    def __init__(self) -> None:
        import grpc
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

        super().__init__()
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Export(self, message: Any, context: Any) -> Any:
        """The one method of the service."""
        self.headers.update(context.invocation_metadata())
        self.take(message)
        return collector_messages.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv(PROTOCOL, "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector = Collector()
    yield collector
    collector.server.shutdown()


@pytest.fixture
def grpc_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcCollector]:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.grpc", reason="the gRPC exporter is not installed"
    )
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector = GrpcCollector()
    yield collector
    collector.server.stop(None).wait(5)


@pytest.fixture
def server(collector: Collector, tmp_path: Path) -> Iterator[RunningServer]:
    server = tiny_server(tmp_path, otlp_traces_endpoint=collector.url)
    yield server
    server.stop()


def values(span: Any) -> dict[str, Any]:
    """A span's attributes."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_a_span_of_its_phases(server: RunningServer, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine"}
    assert server.post("/v1/completions", {**COMPLETION, "n": 2}, headers).status == 200
    eventually(lambda: len(collector.spans) == 7)
    [span] = collector.named("llm_request")
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    own = values(span)
    assert own["gen_ai.request.id"] == "mine"
    assert own["url.path"] == "/v1/completions"
    assert (own["gen_ai.request.n"], own["gen_ai.request.max_tokens"]) == (2, 5)
    assert own["gen_ai.request.temperature"] == 0.5
    assert own["gen_ai.usage.completion_tokens"] == own["gen_ai.usage.output_tokens"] == 10
    assert own["gen_ai.usage.prompt_tokens"] >= 1
    lasted = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert own["gen_ai.latency.e2e"] == pytest.approx(lasted, abs=0.01)
    assert 0 < own["gen_ai.latency.time_to_first_token"] < own["gen_ai.latency.e2e"]
    for index in (0, 1):
        phases = [
            next(s for s in collector.named(name) if values(s)["gen_ai.choice.index"] == index)
            for name in ("queue", "prefill", "decode")
        ]
        assert {phase.parent_span_id for phase in phases} == {span.span_id}
        assert phases[0].start_time_unix_nano >= span.start_time_unix_nano
        assert phases[-1].end_time_unix_nano <= span.end_time_unix_nano
        for before, after in itertools.pairwise(phases):
            assert before.end_time_unix_nano == after.start_time_unix_nano
    finished = [event for event in span.events if event.name == "finished"]
    assert [values(e)["gen_ai.response.finish_reason"] for e in finished] == ["length"] * 2
    resource = {a.key: a.value.string_value for a in collector.resources[0].attributes}
    assert resource["service.name"] == "octavo"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
        (
            "/v1/messages",
            {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
        ),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
    ],
)
def test_every_way_to_the_engine(
    server: RunningServer, collector: Collector, path: str, body: dict[str, Any]
) -> None:
    assert server.post(path, body).status == 200
    eventually(lambda: collector.named("llm_request"))
    [span] = collector.named("llm_request")
    assert not span.parent_span_id
    assert values(span)["gen_ai.usage.output_tokens"] > 0
    assert {s.name for s in collector.spans} >= {"queue", "prefill"}


def test_errors_are_named_and_not_quoted(server: RunningServer, collector: Collector) -> None:
    assert server.post("/v1/completions", {"prompt": "x", "temperature": 77.125}).status == 400
    assert server.get("/health").status == 200
    eventually(lambda: collector.spans)
    [span] = collector.spans
    assert values(span)["error.type"] == "InvalidParameterError"
    assert span.status.code == 2
    assert "77.125" not in str(span)


def test_a_client_that_leaves(server: RunningServer, collector: Collector) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        body = b'{"prompt": "x", "max_tokens": 60, "n": 8, "stream": true, "ignore_eos": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
        client.sendall(head + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        client.recv(64)
    eventually(lambda: collector.named("llm_request"))
    error = values(collector.named("llm_request")[0]).get("error.type")
    # It may have been quicker than its leaving.
    assert error in (None, "ClientDisconnect")


def test_what_is_left_is_sent_at_the_end(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    server = tiny_server(tmp_path, otlp_traces_endpoint=collector.url)
    assert server.post("/v1/completions", COMPLETION).status == 200
    assert not collector.spans
    server.stop()
    assert collector.named("llm_request")


def test_an_unsampled_parent_is_heeded(server: RunningServer, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    assert server.post("/v1/completions", COMPLETION, headers).status == 200
    assert server.post("/v1/completions", COMPLETION).status == 200
    eventually(lambda: collector.named("llm_request"))
    assert len(collector.named("llm_request")) == 1


@pytest.mark.parametrize(
    ("form", "environment"),
    [
        # As vLLM's guide has them, and as OpenTelemetry's has.
        ("grpc://{}", {"OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}),
        ("{}", {"OTEL_EXPORTER_OTLP_INSECURE": "true", PROTOCOL: "grpc"}),
        ("http://{}", {}),
    ],
)
def test_grpc_is_the_protocol_unless_another_is_named(
    start_server: StartServer,
    grpc_collector: GrpcCollector,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = start_server(otlp_traces_endpoint=form.format(grpc_collector.address))
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    assert server.post("/v1/completions", COMPLETION, headers).status == 200
    eventually(lambda: grpc_collector.named("llm_request"))
    [span] = grpc_collector.named("llm_request")
    assert span.trace_id.hex() == TRACE_ID
    assert values(span)["gen_ai.request.max_tokens"] == 5


def test_opentelemetry_s_own_variables_are_heeded(
    start_server: StartServer, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        SHORT_PROTOCOL: "http/protobuf",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=shop,deployment.environment=test",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=books",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(PROTOCOL)
    server = start_server(otlp_traces_endpoint=collector.url)
    assert server.post("/v1/completions", COMPLETION).status == 200
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    assert server.post("/v1/completions", COMPLETION, headers).status == 200
    eventually(lambda: collector.named("llm_request"))
    # The one whose parent was sampled.
    [span] = collector.named("llm_request")
    assert span.trace_id.hex() == TRACE_ID
    assert collector.headers["x-tenant"] == "books"
    resource = {a.key: a.value.string_value for a in collector.resources[0].attributes}
    assert (resource["service.name"], resource["deployment.environment"]) == ("shop", "test")
    assert resource["service.version"]
    # Its own variable stands above the others' list.
    monkeypatch.setenv("OTEL_SERVICE_NAME", "till")
    named = tracing.Tracing(collector.url)
    assert named._provider.resource.attributes["service.name"] == "till"
    named.close()


def test_a_collector_that_is_not_there_costs_nobody_an_answer(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROTOCOL, "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    server = start_server(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    assert server.post("/v1/completions", COMPLETION).status == 200


def test_a_wrong_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOL, "carrier-pigeon")
    with pytest.raises(ValueError, match="grpc or http/protobuf, not 'carrier-pigeon'"):
        tracing.Tracing("http://localhost:4317")


def test_nothing_is_imported_without_the_flag() -> None:
    code = (
        "import sys\n"
        "from octavo.server.http.config import ServerConfig\n"
        "from octavo.server.lifecycle import Lifecycle\n"
        "lifecycle = Lifecycle(ServerConfig(), lambda: None)\n"
        "assert lifecycle.state.tracing is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ServerConfig().otlp_traces_endpoint is None
