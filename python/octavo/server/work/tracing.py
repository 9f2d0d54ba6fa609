"""Tracing: a span for each request that queues for the engine, sent to an OpenTelemetry collector.

The span begins at the request's arrival, under the client's own where its headers name one (W3C
``traceparent``). Below it each sample has three: queue, prefill, decode. Their times are the
core's, so nothing is done per token, and nothing at all without ``--otlp-traces-endpoint``.
Attributes have the names of vLLM's traces, and those of OpenTelemetry's conventions for generative
AI (opentelemetry.io/docs/specs/semconv/gen-ai).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from octavo import __version__

if TYPE_CHECKING:
    from starlette.types import Scope

    from octavo.sampling_params import SamplingParams
    from octavo.server.work.news import News

# vLLM's name for the span, which saved searches have.
SPAN_NAME: Final = "llm_request"
# grpc, or http/protobuf; the first that is set. vLLM reads the first alone.
PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# How long spans that are still to be sent may hold up the end of the process.
_FLUSH_MS: Final = 2000


class Tracing:
    """Makes spans. The library sends them in batches, from a thread of its own.

    Sampling, headers, batches and the resource's attributes are set by OpenTelemetry's own
    variables (``OTEL_*``).

    Args:
        endpoint: the collector's address: of gRPC ``http://host:4317`` (in the clear),
            ``https://``, ``grpc://`` or none of these words (as OTEL_EXPORTER_OTLP_INSECURE asks);
            of HTTP the whole URL.

    Raises:
        ValueError: OpenTelemetry is not installed, or the protocol is not one of two.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = _exporter(endpoint)
        except ImportError as error:
            raise ValueError(
                f"otlp_traces_endpoint needs OpenTelemetry: pip install 'octavo[otel]' ({error})"
            ) from None
        # OpenTelemetry's variables stand above what octavo says of itself.
        own = Resource({"service.name": "octavo", "service.version": __version__})
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, request_id: str) -> RequestTrace:
        """The span of a request that has just arrived."""
        from opentelemetry.trace import SpanKind

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        span = self._tracer.start_span(
            SPAN_NAME,
            self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"url.path": scope["path"], "gen_ai.request.id": request_id},
        )
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Send what is left, for a short time; blocks."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def _exporter(endpoint: str) -> Any:
    given = next((name for name in PROTOCOL_VARIABLES if os.environ.get(name)), None)
    protocol = os.environ[given] if given else "grpc"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(endpoint=endpoint, insecure=endpoint.startswith("http://") or None)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter as HttpExporter,
        )

        return HttpExporter(endpoint=endpoint)
    raise ValueError(f"{given} must be grpc or http/protobuf, not {protocol!r}")


class RequestTrace:
    """One request's span, from its arrival to its last byte."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._began_ns = self._submitted_ns = time.time_ns()
        self._num_prompt = self._num_output = 0

    def submitted(self, model: str, params: SamplingParams) -> None:
        """Note what was asked for, when the samples are queued."""
        self._submitted_ns = time.time_ns()
        self._span.set_attributes(
            {
                "gen_ai.response.model": model,
                "gen_ai.request.model": model,
                "gen_ai.request.n": params.n,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
            }
        )
        if params.max_tokens is not None:
            self._span.set_attribute("gen_ai.request.max_tokens", params.max_tokens)

    def sample_over(self, index: int, news: News) -> None:
        """Add a sample's spans, from the last news of it. ``index``: its choice."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        self._num_prompt = max(self._num_prompt, news.num_prompt_tokens)
        self._num_output += news.num_output_tokens
        under = set_span_in_context(self._span)
        at = self._submitted_ns
        phases = {"queue": news.queue_s, "prefill": news.prefill_s, "decode": news.decode_s}
        for name, seconds in phases.items():
            if seconds is None:
                break
            child = self._tracer.start_span(
                name, under, start_time=at, attributes={"gen_ai.choice.index": index}
            )
            at += int(seconds * 1e9)
            child.end(at)
        if index == 0:
            self._set_latencies(news)
        if news.finish_reason == "error":
            self._span.set_status(StatusCode.ERROR, "the generation failed")
        self._span.add_event(
            "finished",
            {
                "gen_ai.choice.index": index,
                "gen_ai.response.finish_reason": news.finish_reason or "",
                "gen_ai.usage.cached_tokens": news.num_cached_tokens,
            },
        )

    def _set_latencies(self, news: News) -> None:
        values = {
            "gen_ai.latency.time_in_queue": news.queue_s,
            "gen_ai.latency.time_in_model_prefill": news.prefill_s,
            "gen_ai.latency.time_in_model_decode": news.decode_s,
        }
        if news.queue_s is not None and news.prefill_s is not None:
            before = (self._submitted_ns - self._began_ns) / 1e9
            values["gen_ai.latency.time_to_first_token"] = before + news.queue_s + news.prefill_s
        self._span.set_attributes({k: v for k, v in values.items() if v is not None})

    def end(self, error: BaseException | None = None) -> None:
        """End the span. ``error``: why there was no answer, or not all of it."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(
            {
                "gen_ai.usage.prompt_tokens": self._num_prompt,
                "gen_ai.usage.input_tokens": self._num_prompt,
                "gen_ai.usage.completion_tokens": self._num_output,
                "gen_ai.usage.output_tokens": self._num_output,
                "gen_ai.latency.e2e": (time.time_ns() - self._began_ns) / 1e9,
            }
        )
        if error is not None:
            # The kind alone: messages may hold what the client sent.
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(StatusCode.ERROR, type(error).__name__)
        self._span.end()
