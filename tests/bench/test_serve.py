"""The load generator end to end, against a fake server. Counts are checked, not speeds."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from octavo.bench import add_subcommands
from octavo.bench.serve import BenchError, run_load
from octavo.bench.stream_client import StreamClient, StreamTiming
from octavo.bench.workload import Workload


def _stream(server: Any, path: str = "/v1/completions", **fields: Any) -> StreamTiming:
    async def send() -> StreamTiming:
        client = StreamClient(server.base_url)
        body = orjson.dumps({"stream": True, "max_tokens": 5, "prompt": [1, 2], **fields})
        try:
            return await client.stream(path, body, 10.0)
        finally:
            client.close()

    return asyncio.run(send())


@pytest.mark.parametrize("piece_len", [0, 1, 7])
def test_client_times_a_stream_however_it_is_cut(server: Any, piece_len: int) -> None:
    server.piece_len = piece_len
    timing = _stream(server)
    assert timing.error is None
    assert timing.first_s is not None
    assert timing.first_s - timing.start_s >= server.first_s
    # Not since the first chunk, which may be read late.
    assert timing.last_s - timing.start_s >= server.first_s + 4 * server.step_s
    assert (timing.num_chunks, len(timing.gaps_us)) == (5, 4)
    assert (timing.num_prompt_tokens, timing.num_output_tokens) == (2, 5)
    assert timing.num_cached_tokens == 3
    assert sum(timing.gaps_us) == pytest.approx((timing.last_s - timing.first_s) * 1e6, abs=5)


def test_a_chats_role_chunk_is_not_its_first_token(server: Any) -> None:
    server.first_s = 0.1
    timing = _stream(server, "/v1/chat/completions")
    assert timing.error is None
    assert timing.first_s is not None
    assert timing.first_s - timing.start_s >= 0.1
    assert timing.num_chunks == 5


def test_failures_are_told_apart(server: Any) -> None:
    server.fail_every = 1
    failed = _stream(server).error
    assert failed is not None
    assert failed.startswith("HTTP 503")
    assert "queue is full" in failed
    server.fail_every = 0
    server.truncate = True
    cut = _stream(server).error
    assert cut is not None
    assert "closed the connection" in cut


def test_client_reconnects_to_a_server_that_closes(server: Any) -> None:
    server.close_after = True

    async def send_three() -> list[str | None]:
        client = StreamClient(server.base_url)
        body = orjson.dumps({"stream": True, "max_tokens": 2, "prompt": [1]})
        try:
            return [(await client.stream("/v1/completions", body, 10.0)).error for _ in range(3)]
        finally:
            client.close()

    assert asyncio.run(send_three()) == [None] * 3


def test_every_request_is_sent_once_at_the_concurrency_asked_for(server: Any) -> None:
    workload = Workload(model="m", num_requests=30, input_len=12, output_len=6, len_spread=0.5)
    timings, cpu_shares = run_load(
        workload,
        base_urls=[server.base_url],
        concurrency=6,
        num_processes=2,
        num_warmups=3,
        api_key="key",
    )
    assert len(cpu_shares) == 2
    assert [t.error for t in timings] == [None] * 30
    lengths = [workload.lengths(i) for i in range(30)]
    assert [(t.num_prompt_tokens, t.num_output_tokens) for t in timings] == lengths
    measured = server.bodies[3:]
    assert sorted(b["prompt"] for b in measured) == sorted(
        workload.prompt_token_ids(i) for i in range(30)
    )
    # Warm-ups leave nothing of the measured prompts in a prefix cache.
    assert not any(b["prompt"] in [m["prompt"] for m in measured] for b in server.bodies[:3])
    assert server.max_in_flight == 6
    assert server.authorizations == {"Bearer key"}


def test_replicas_share_the_load(server: Any) -> None:
    workload = Workload(num_requests=12, input_len=4, output_len=3)
    with type(server)().running() as other:
        timings, cpu_shares = run_load(
            workload,
            base_urls=[server.base_url, other.base_url],
            concurrency=4,
            num_processes=1,
        )
    assert [t.error for t in timings] == [None] * 12
    assert len(cpu_shares) == 2
    assert server.bodies
    assert other.bodies
    assert len(server.bodies) + len(other.bodies) == 12


def test_a_request_rate_sends_every_request_once(server: Any) -> None:
    workload = Workload(num_requests=20, input_len=4, output_len=2)
    timings, _ = run_load(
        workload, base_urls=[server.base_url], concurrency=20, num_processes=2, request_rate=200.0
    )
    assert [t.error for t in timings] == [None] * 20
    arrivals = workload.arrivals_s(200.0)
    sent = [t.start_s for t in timings]
    # No request leaves before its time (the clock starts with the first one sent).
    late = [s - a for s, a in zip(sent, arrivals, strict=True)]
    assert max(late) - min(late) < 1.0
    assert max(sent) - min(sent) >= 0.5 * arrivals[-1]


def test_no_server_is_an_error_not_a_hang() -> None:
    workload = Workload(num_requests=2, input_len=4, output_len=2)
    with pytest.raises(BenchError, match=r"127\.0\.0\.1:9"):
        run_load(workload, base_urls=["http://127.0.0.1:9"], concurrency=2, num_processes=1)


@pytest.fixture
def bench() -> Callable[..., int]:
    parser = argparse.ArgumentParser()
    add_subcommands(parser.add_subparsers(required=True))

    def run(*argv: str) -> int:
        args = parser.parse_args(argv)
        status: int = args.run(args)
        return status

    return run


def test_command_reports_medians(
    server: Any, bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, markdown = tmp_path / "out.json", tmp_path / "results" / "out.md"
    shape = ["--num-requests", "4", "--input-len", "8", "--output-len", "3"]
    load = ["--concurrency", "2", "--num-processes", "1", "--num-warmups", "0", "--repeat", "3"]
    files = ["--json", str(json_file), "--markdown", str(markdown)]
    url = ["--base-url", server.base_url, "--api-key", "secret", "--check"]
    assert bench("serve", *url, *shape, *load, *files) == 0
    report = orjson.loads(json_file.read_bytes())
    assert report["settings"]["model"] == "fake-model"
    assert report["server"] == {"version": "1"}
    assert report["check"].endswith("'Paris'")
    assert [run["num_ok"] for run in report["runs"]] == [4, 4, 4]
    assert report["medians"]["num_output_tokens"] == {"median": 12, "min": 12, "max": 12}
    assert {"machine", "versions", "commit", "command", "date"} <= set(report["environment"])
    # Each repetition sends prompts of its own: a prefix cache must not answer for the engine.
    assert len({tuple(b["prompt"]) for b in server.bodies}) == 12
    table = markdown.read_text()
    assert "| output_tokens_per_s |" in table
    assert "median of 3" in table
    assert "- commit: " in table
    out = capsys.readouterr().out
    assert "ttft_p50_ms" in out
    assert "secret" not in out + table + json_file.read_text()


def test_command_fails_when_requests_fail(
    server: Any, bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail_every = 2
    assert bench("serve", "--base-url", server.base_url, "--num-requests", "4",
                 "--num-warmups", "0", "--num-processes", "1") == 1  # fmt: skip
    assert "2 requests failed" in capsys.readouterr().err
