"""GET /metrics: the core's counters in Prometheus' text format, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from starlette.responses import Response

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


class Row(NamedTuple):
    """One metric: its key in the snapshot, its help text, and the label of a labelled one."""

    key: str
    help: str
    label: str | None = None
    # Further names it is published under, for dashboards made for older versions.
    aliases: tuple[str, ...] = ()
    prefix: str = "vllm:"
    # Its published name where that is not the key.
    name: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name it is published under."""
        return tuple(self.prefix + name for name in (self.name or self.key, *self.aliases))


GAUGES: Final = (
    Row("num_requests_running", "Requests in the running batch."),
    Row("num_requests_waiting", "Requests waiting to be scheduled."),
    Row(
        "kv_cache_usage_perc",
        "Part of the KV cache in use; 1 is all of it.",
        aliases=("gpu_cache_usage_perc",),
    ),
)
COUNTERS: Final = (
    Row("prompt_tokens", "Prompt tokens processed."),
    Row("generation_tokens", "Tokens generated."),
    Row("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    Row("prefix_cache_hits", "Tokens found in the prefix cache."),
    Row("num_preemptions", "Requests preempted."),
    Row("request_success", "Requests that ended, by reason.", label="finished_reason"),
)
HISTOGRAMS: Final = (
    Row("time_to_first_token_seconds", "From arrival to the first token."),
    Row(
        "inter_token_latency_seconds",
        "Between two tokens of a request.",
        aliases=("time_per_output_token_seconds",),
    ),
    Row(
        "request_time_per_output_token_seconds", "A request's mean time per token after the first."
    ),
    Row("e2e_request_latency_seconds", "From arrival to the last token."),
    Row("request_queue_time_seconds", "From arrival to the first step."),
    Row("request_prefill_time_seconds", "From the first step to the first token."),
    Row("request_decode_time_seconds", "From the first token to the last."),
    Row("request_inference_time_seconds", "From the first step to the last token."),
    Row("request_prompt_tokens", "Prompt tokens of a request."),
    Row("request_generation_tokens", "Tokens generated for a request."),
    Row("request_params_n", "The n of a request."),
    Row("request_params_max_tokens", "The max_tokens of a request."),
    Row("request_max_num_generation_tokens", "The longest sample of a request, in tokens."),
    # A histogram whose name ends like a counter's, as dashboards have it.
    Row("iteration_tokens", "Tokens in one step.", name="iteration_tokens_total"),
    Row("step_seconds", "One step of the engine, by phase.", label="phase", prefix="octavo:"),
)


class EngineCollector:
    """Reads one consistent snapshot per scrape. Nothing is counted in Python per token."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._labels = {"model_name": state.model().names[0], "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        """Every metric of the core, and those of the front end."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engine = self._state.model().engine
        snapshot = {**engine.metrics.snapshot(), "step_seconds": engine.step_times.snapshot()}
        for row in GAUGES:
            yield from self._families(GaugeMetricFamily, row, snapshot)
        for row in COUNTERS:
            yield from self._families(CounterMetricFamily, row, snapshot)
        for row in HISTOGRAMS:
            yield from self._histograms(row, snapshot)
        rejections = Row("admission_rejections", "Requests turned away, by reason.", "reason")
        values = {"admission_rejections": dict(self._state.rejections)}
        yield from self._families(CounterMetricFamily, rejections, values)
        calls = Row(
            "tool_call_parser_invocations", "Answers to requests with tools, by outcome.", "status"
        )
        values = {calls.key: dict(self._state.model().tool_call_counts)}
        yield from self._families(CounterMetricFamily, calls, values)
        prefixes = Row(
            "agent_prompts",
            "Prompts of agents' conversations: new, extended, or diverged from an earlier one.",
            "outcome",
            prefix="octavo:",
        )
        values = {prefixes.key: dict(self._state.model().prompt_history.counts)}
        yield from self._families(CounterMetricFamily, prefixes, values)
        yield self._cache_config()

    def _families(
        self, family_class: Any, row: Row, snapshot: Mapping[str, Any]
    ) -> Iterable[Metric]:
        if row.key not in snapshot:
            return
        value = snapshot[row.key]
        names = [*self._labels, *((row.label,) if row.label else ())]
        for name in row.names:
            family = family_class(name, row.help, labels=names)
            for label, number in value.items() if row.label else (("", value),):
                extra = (label,) if row.label else ()
                family.add_metric([*self._labels.values(), *extra], number)
            yield family

    def _histograms(self, row: Row, snapshot: Mapping[str, Any]) -> Iterable[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        if row.key not in snapshot:
            return
        value = snapshot[row.key]
        names = [*self._labels, *((row.label,) if row.label else ())]
        for name in row.names:
            family = HistogramMetricFamily(name, row.help, labels=names)
            for label, histogram in value.items() if row.label else (("", value),):
                extra = (label,) if row.label else ()
                family.add_metric(
                    [*self._labels.values(), *extra], _buckets(histogram), histogram["sum"]
                )
            yield family

    def _cache_config(self) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        config = self._state.model().engine.config
        labels = {
            **self._labels,
            "block_size": str(config.block_size),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
            "kv_cache_memory_bytes": str(config.kv_cache_memory_bytes),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "How the KV cache is set up.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1)
        return family


def _buckets(histogram: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Prometheus' buckets: cumulative counts by upper bound, the last one infinite."""
    buckets = [
        (str(float(bound)), float(count))
        for bound, count in histogram["buckets"]
        if bound != float("inf")
    ]
    return [*buckets, ("+Inf", float(histogram["count"]))]


def make_registry(state: ServerState) -> CollectorRegistry:
    """The engine's metrics and the process's (memory, CPU, file descriptors)."""
    from prometheus_client import CollectorRegistry, ProcessCollector

    # auto_describe off: describing needs an engine, which may not be loaded yet.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(state))
    ProcessCollector(registry=registry)
    return registry


async def metrics(state: ServerState, exchange: Exchange) -> None:
    """Prometheus' text format."""
    # Imported by the first scrape: 50 ms that start-up need not pay.
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    body = generate_latest(make_registry(state))
    await exchange.respond(Response(body, headers={"content-type": CONTENT_TYPE_LATEST}))
