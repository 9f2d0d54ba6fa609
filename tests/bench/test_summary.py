"""The arithmetic of the figures, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from octavo.bench.stream_client import StreamTiming
from octavo.bench.summary import format_figure, medians, percentiles_ms, summarize


def _timing(start: float, first: float, gaps_ms: list[int], **more: int) -> StreamTiming:
    return StreamTiming(
        start_s=start,
        first_s=first,
        last_s=first + sum(gaps_ms) / 1e3,
        gaps_us=[gap * 1000 for gap in gaps_ms],
        num_chunks=len(gaps_ms) + 1,
        **more,
    )


def test_percentiles_interpolate() -> None:
    figures = percentiles_ms("x", [0.001, 0.002, 0.003, 0.004])
    assert figures["x_mean_ms"] == pytest.approx(2.5)
    assert figures["x_p50_ms"] == pytest.approx(2.5)
    assert figures["x_p90_ms"] == pytest.approx(3.7)
    assert figures["x_p99_ms"] == pytest.approx(3.97)
    assert percentiles_ms("x", []) == {}


def test_figures_of_a_run() -> None:
    timings = [
        # 5 tokens in 3 chunks: TPOT counts tokens, ITL chunks.
        _timing(10.0, 10.1, [20, 60], num_prompt_tokens=30, num_output_tokens=5),
        _timing(10.5, 10.8, [100], num_prompt_tokens=10, num_output_tokens=2, num_cached_tokens=8),
        StreamTiming(start_s=10.0, last_s=12.0, error="HTTP 503"),
    ]
    figures = summarize(timings, [0.25, 0.5])
    assert (figures["num_ok"], figures["num_failed"]) == (2, 1)
    assert figures["duration_s"] == pytest.approx(2.0)
    assert figures["requests_per_s"] == pytest.approx(1.0)
    assert figures["output_tokens_per_s"] == pytest.approx(3.5)
    assert figures["total_tokens_per_s"] == pytest.approx(23.5)
    assert figures["num_cached_tokens"] == 8
    assert figures["tokens_per_chunk"] == pytest.approx(7 / 5)
    assert figures["ttft_mean_ms"] == pytest.approx(200)
    # 80 ms over 4 tokens, and 100 ms over 1.
    assert figures["tpot_mean_ms"] == pytest.approx(60)
    assert figures["itl_p50_ms"] == pytest.approx(60)
    assert figures["e2e_p50_ms"] == pytest.approx((180 + 400) / 2)
    assert figures["client_cpu_share_max"] == 0.5


def test_one_token_answers_have_no_tpot() -> None:
    figures = summarize([_timing(0.5, 1.0, [], num_output_tokens=1)])
    assert "tpot_p50_ms" not in figures
    assert "itl_p50_ms" not in figures
    assert figures["ttft_p50_ms"] == pytest.approx(500)


def test_nothing_but_failures() -> None:
    figures = summarize([StreamTiming(start_s=1.0, last_s=2.0, error="x")])
    assert figures["num_failed"] == 1
    assert figures["output_tokens_per_s"] == 0
    assert "ttft_p50_ms" not in figures


def test_medians_and_spread() -> None:
    spreads = medians([{"a": 3.0, "b": 1.0}, {"a": 1.0}, {"a": 2.0, "b": 9.0}])
    assert set(spreads) == {"a"}
    assert (spreads["a"].median, spreads["a"].low, spreads["a"].high) == (2.0, 1.0, 3.0)
    assert str(spreads["a"]) == "2 (1 to 3)"
    assert medians([]) == {}


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (1234567, "1,234,567"), (1.23456, "1.235"), (0, "0")]
)
def test_format(value: float, text: str) -> None:
    assert format_figure(value) == text
