"""``octavo bench serve``: load on any OpenAI-compatible server, from several processes.

One Python process saturates near 15 to 30 thousand streamed tokens a second; beyond that it would
measure itself, so the streams are spread over processes and each reports its own CPU share.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from octavo.bench import report
from octavo.bench.report import Report
from octavo.bench.stream_client import StreamClient, StreamTiming
from octavo.bench.summary import Figures, summarize
from octavo.bench.worker import INDEX_BYTES, Job
from octavo.bench.workload import Workload

CHECK_PROMPT = "What is the capital of France? Answer in one word."
# A client above this share of its core may be what is measured.
BUSY_SHARE = 0.8


class BenchError(Exception):
    """The benchmark could not be run; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``octavo bench serve``."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url",
        nargs="+",
        default=["http://127.0.0.1:8000"],
        help="several are replicas of one model: the load's processes take them in turns",
    )
    server.add_argument("--model", help="default: the first that /v1/models lists")
    server.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY"
    )
    server.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    server.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency", type=int, help="streams at once; default: all, or as the rate needs"
    )
    load.add_argument("--request-rate", type=float, help="requests a second, Poisson arrivals")
    load.add_argument("--num-requests", type=int, default=100)
    load.add_argument("--num-processes", type=int, help="default: the cores, at most 4")
    load.add_argument("--num-warmups", type=int, help="default: one per stream, at most 16")
    shape = parser.add_argument_group("requests")
    shape.add_argument("--input-len", type=int, default=512, help="prompt tokens")
    shape.add_argument("--output-len", type=int, default=128, help="output tokens")
    shape.add_argument("--len-spread", type=float, default=0.0, help="0.8: lengths vary by 80%%")
    shape.add_argument("--shared-prefix-len", type=int, default=0, help="tokens all prompts share")
    shape.add_argument("--vocab-size", type=int, default=32_000, help="prompt ids are below this")
    shape.add_argument("--min-token-id", type=int, default=100, help="and not below this")
    shape.add_argument("--temperature", type=float, default=0.0)
    shape.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false")
    shape.add_argument("--extra-body", type=orjson.loads, default={}, help="JSON for every request")
    shape.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", action="store_true", help=f"first ask {CHECK_PROMPT!r} and show the answer"
    )
    report.add_arguments(parser)


async def _ask(client: StreamClient, model: str | None) -> str:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": CHECK_PROMPT}],
        "temperature": 0.0,
        "max_tokens": 16,
    }
    if model is not None:
        body["model"] = model
    status, answer = await client.json("POST", "/v1/chat/completions", orjson.dumps(body))
    if status != 200 or answer is None:
        raise BenchError(f"the check was answered with HTTP {status}: {answer}")
    text: str = answer["choices"][0]["message"]["content"]
    return f"{CHECK_PROMPT} -> {text.strip()!r}"


async def _probe(args: argparse.Namespace) -> tuple[str | None, dict[str, Any], str | None]:
    """(model, what the server says of itself, the check's outcome)."""
    base_url = args.base_url[0]
    client = StreamClient(base_url, args.api_key)
    try:
        status, models = await client.json("GET", "/v1/models")
        if status == 401:
            raise BenchError("the server refuses the key: pass --api-key")
        model = args.model or (models["data"][0]["id"] if status == 200 and models else None)
        status, version = await client.json("GET", "/version")
        server = version if status == 200 and isinstance(version, dict) else {}
        check = await _ask(client, model) if args.check else None
    except OSError as error:
        raise BenchError(f"no answer from {base_url}: {error}") from None
    finally:
        client.close()
    return model, server, check


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    base_url: str

    def send(self, value: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(orjson.dumps(value) + b"\n")
        self.popen.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise BenchError(f"a load process died with status {self.popen.wait()}")
        value: dict[str, Any] = orjson.loads(line)
        return value


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _feed(fd: int, num_requests: int) -> None:
    """Write the request numbers; the pipe's end tells the workers there are no more."""
    with os.fdopen(fd, "wb", buffering=0) as pipe:
        try:
            for index in range(num_requests):
                pipe.write(index.to_bytes(INDEX_BYTES, "little"))
        except BrokenPipeError:
            return  # the workers are gone; receive() has the reason


def run_load(
    workload: Workload,
    *,
    base_urls: Sequence[str],
    concurrency: int,
    num_processes: int,
    num_warmups: int = 0,
    request_rate: float | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
) -> tuple[list[StreamTiming], list[float]]:
    """One run: (the requests' timings in request order, each process's CPU share).

    Raises:
        BenchError: a server cannot be reached or a warm-up request fails.
    """
    # At least one for each server.
    num_processes = min(max(num_processes, len(base_urls)), concurrency)
    read_fd, write_fd = os.pipe()
    processes: list[_Process] = []
    try:
        for worker, streams in enumerate(_shares(concurrency, num_processes)):
            popen = subprocess.Popen(
                [sys.executable, "-m", "octavo.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(read_fd,),
            )
            base_url = base_urls[worker % len(base_urls)]
            processes.append(_Process(popen, base_url))
            job = Job(
                base_url=base_url,
                api_key=api_key,
                workload=dataclasses.asdict(workload),
                worker=worker,
                num_workers=num_processes,
                concurrency=streams,
                request_rate=request_rate,
                num_warmups=num_warmups,
                index_fd=read_fd,
                timeout_s=timeout_s,
            )
            processes[-1].send(dataclasses.asdict(job))
        os.close(read_fd)
        read_fd = -1
        for process in processes:
            answer = process.receive()
            if not answer["ready"]:
                raise BenchError(f"{process.base_url}: {answer['error']}")
        feeder = threading.Thread(target=_feed, args=(write_fd, workload.num_requests))
        feeder.start()
        write_fd = -1
        # Time for every process to read its first requests and build them.
        start_s = time.monotonic() + 0.1
        for process in processes:
            process.send(start_s)
        answers = [process.receive() for process in processes]
        feeder.join()
    finally:
        for fd in (read_fd, write_fd):
            if fd >= 0:
                os.close(fd)
        for process in processes:
            process.popen.kill()
            process.popen.communicate()
    results = sorted(
        (result for answer in answers for result in answer["results"]), key=lambda r: r["index"]
    )
    timings = [StreamTiming(**{k: v for k, v in r.items() if k != "index"}) for r in results]
    return timings, [answer["cpu_share"] for answer in answers]


def _warn(workload: Workload, timings: list[StreamTiming], figures: Figures) -> None:
    failed = [t.error for t in timings if t.error is not None]
    if failed:
        print(f"warning: {len(failed)} requests failed; the first: {failed[0]}", file=sys.stderr)
    if workload.ignore_eos:
        wrong = sum(
            t.error is None and t.num_output_tokens != workload.lengths(i)[1]
            for i, t in enumerate(timings)
        )
        if wrong:
            print(f"warning: {wrong} answers were not of the length asked for", file=sys.stderr)
    if figures.get("client_cpu_share_max", 0) > BUSY_SHARE:
        print(
            "warning: the load processes are busy themselves; raise --num-processes",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the process's exit status."""
    try:
        model, server, check = asyncio.run(_probe(args))
        if check is not None:
            print(f"check: {check}", flush=True)
        workload = Workload(
            endpoint=args.endpoint,
            model=model,
            num_requests=args.num_requests,
            input_len=args.input_len,
            output_len=args.output_len,
            len_spread=args.len_spread,
            shared_prefix_len=args.shared_prefix_len,
            min_token_id=args.min_token_id,
            vocab_size=args.vocab_size,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
            seed=args.seed,
            extra_body=args.extra_body,
        )
        concurrency = min(args.concurrency or args.num_requests, args.num_requests)
        processes = args.num_processes or min(4, len(os.sched_getaffinity(0)))
        warmups = min(concurrency, 16) if args.num_warmups is None else args.num_warmups
        runs: list[Figures] = []
        for number in range(args.repeat):
            # Other prompts each time, or a prefix cache would answer the second run.
            repeated = dataclasses.replace(workload, seed=workload.seed + number)
            timings, cpu_shares = run_load(
                repeated,
                base_urls=args.base_url,
                concurrency=concurrency,
                num_processes=processes,
                num_warmups=warmups if number == 0 else 0,
                request_rate=args.request_rate,
                api_key=args.api_key,
                timeout_s=args.timeout,
            )
            figures = summarize(timings, cpu_shares)
            _warn(repeated, timings, figures)
            runs.append(figures)
    except (BenchError, ValueError) as error:
        print(f"octavo bench serve: {error}", file=sys.stderr)
        return 1
    load = f"{args.request_rate}/s" if args.request_rate else f"c={concurrency}"
    title = args.title or f"{model}: {args.input_len}/{args.output_len}, {load}"
    settings = dataclasses.asdict(workload) | {
        "concurrency": concurrency,
        "request_rate": args.request_rate,
        "num_processes": processes,
        "num_warmups": warmups,
    }
    Report(
        title=title, settings=settings, runs=runs, check=check, details={"server": server}
    ).write(args)
    return 1 if any(run["num_failed"] for run in runs) else 0
