"""Summary: the figures of one run, and the medians of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from octavo.bench.stream_client import StreamTiming

Figures = dict[str, float]


def percentiles_ms(name: str, values_s: Sequence[float]) -> Figures:
    """``{name}_{mean,p50,p90,p99}_ms`` of durations in seconds; empty without any.

    Percentiles interpolate linearly between neighbours, as numpy does.
    """
    if not len(values_s):
        return {}
    values = np.asarray(values_s, dtype=np.float64) * 1e3
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        f"{name}_mean_ms": float(values.mean()),
        f"{name}_p50_ms": float(p50),
        f"{name}_p90_ms": float(p90),
        f"{name}_p99_ms": float(p99),
    }


def summarize(timings: Sequence[StreamTiming], cpu_shares: Sequence[float] = ()) -> Figures:
    """The figures of one run.

    Tokens are counted by the server's ``usage``. TPOT is a request's time per output token after
    the first; ITL is the time between chunks, which may carry several tokens: ``tokens_per_chunk``
    says how many.
    """
    good = [t for t in timings if t.error is None and t.first_s is not None]
    figures: Figures = {"num_ok": len(good), "num_failed": len(timings) - len(good)}
    if not timings:
        return figures
    duration_s = max(t.last_s for t in timings) - min(t.start_s for t in timings)
    duration_s = max(duration_s, 1e-9)
    num_output = sum(t.num_output_tokens for t in good)
    num_prompt = sum(t.num_prompt_tokens for t in good)
    figures |= {
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "output_tokens_per_s": num_output / duration_s,
        "total_tokens_per_s": (num_output + num_prompt) / duration_s,
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": sum(t.num_cached_tokens for t in good),
        "num_output_tokens": num_output,
    }
    num_chunks = sum(t.num_chunks for t in good)
    if num_chunks:
        figures["tokens_per_chunk"] = num_output / num_chunks
    figures |= percentiles_ms("ttft", [t.first_s - t.start_s for t in good if t.first_s])
    figures |= percentiles_ms(
        "tpot",
        [
            (t.last_s - t.first_s) / (t.num_output_tokens - 1)
            for t in good
            if t.first_s and t.num_output_tokens > 1
        ],
    )
    figures |= percentiles_ms("itl", [gap * 1e-6 for t in good for gap in t.gaps_us])
    figures |= percentiles_ms("e2e", [t.last_s - t.start_s for t in good])
    if cpu_shares:
        # Near 1.0 the client is what is measured.
        figures["client_cpu_share_max"] = max(cpu_shares)
    return figures


@dataclass(frozen=True)
class Spread:
    """One figure over several runs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        text = format_figure(self.median)
        if self.low == self.high:
            return text
        return f"{text} ({format_figure(self.low)} to {format_figure(self.high)})"


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Median, lowest and highest of every figure that all runs have."""
    names = [name for name in runs[0] if all(name in run for run in runs)] if runs else []
    return {
        name: Spread(
            median(run[name] for run in runs),
            min(run[name] for run in runs),
            max(run[name] for run in runs),
        )
        for name in names
    }


def format_figure(value: float) -> str:
    """Four significant digits, thousands set off: enough to compare by, not more than is true."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def spreads_json(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    """The same as plain values, for a JSON file."""
    return {name: {"median": s.median, "min": s.low, "max": s.high} for name, s in spreads.items()}


def table(spreads: Mapping[str, Spread], names: Iterable[str] | None = None) -> str:
    """Lines ``name value`` for a terminal."""
    rows = [(name, str(spreads[name])) for name in (names or spreads) if name in spreads]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
