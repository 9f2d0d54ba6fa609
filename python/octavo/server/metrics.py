"""GET /metrics: the core's counters in Prometheus' text format, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from octavo.metric_names import COUNTERS, GAUGES, HISTOGRAMS, Row

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


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
        by_reason = {"capacity": snapshot["num_requests_waiting"], "deferred": 0}
        snapshot["num_requests_waiting_by_reason"] = by_reason
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

        engine = self._state.model().engine
        config = engine.config
        labels = {
            **self._labels,
            "block_size": str(config.block_size),
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
            "kv_cache_memory_bytes": str(config.kv_cache_memory_bytes),
            "kv_cache_size_tokens": str(engine.num_kv_tokens),
            # Requests of the longest kind that fit side by side.
            "kv_cache_max_concurrency": f"{engine.num_kv_tokens / engine.max_model_len:.2f}",
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
