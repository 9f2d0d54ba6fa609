"""Metrics of an engine as Python values, in the shapes of vLLM's ``v1.metrics.reader``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.metric_names import COUNTERS, GAUGES, HISTOGRAMS, Row


@dataclass(slots=True)
class Metric:
    """``name``: as published at /metrics, of a counter without ``_total``."""

    name: str
    labels: dict[str, str]


@dataclass(slots=True)
class Counter(Metric):
    """Something that only grows."""

    value: int


@dataclass(slots=True)
class Vector(Metric):
    """Several counters under one name."""

    values: list[int]


@dataclass(slots=True)
class Gauge(Metric):
    """Something that goes up and down."""

    value: float


@dataclass(slots=True)
class Histogram(Metric):
    """``buckets``: by upper bound as text, the number of observations at or below it."""

    count: int
    sum: float
    buckets: dict[str, int]


def read_metrics(snapshot: Mapping[str, Any], model_name: str) -> list[Metric]:
    """Every metric of a snapshot of the core's."""
    found: list[Metric] = []
    for row in (*GAUGES, *COUNTERS, *HISTOGRAMS):
        if row.key not in snapshot:
            continue
        value = snapshot[row.key]
        own = {"model_name": model_name, "engine": "0"}
        parts = value.items() if row.label else (("", value),)
        for label, part in parts:
            labels = own | ({row.label: label} if row.label else {})
            found += [_metric(row, name, labels, part) for name in row.names]
    return found


def _metric(row: Row, name: str, labels: dict[str, str], value: Any) -> Metric:
    if row in GAUGES:
        return Gauge(name, labels, float(value))
    if row in COUNTERS:
        return Counter(name, labels, int(value))
    buckets = {
        "+Inf" if bound == float("inf") else str(float(bound)): int(count)
        for bound, count in value["buckets"]
    }
    buckets["+Inf"] = int(value["count"])
    return Histogram(name, labels, int(value["count"]), float(value["sum"]), buckets)
