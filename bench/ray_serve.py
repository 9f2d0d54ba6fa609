"""Throughput over the number of replicas on Ray, and what Ray adds to a request.

    python bench/ray_serve.py --model MODEL --replicas 1 2 4 --concurrency 64
    python bench/ray_serve.py --model MODEL --device cpu --threads 1 --replicas 1 2 --concurrency 4

Each number of replicas is deployed anew and gets its share of the load (``concurrency`` streams
each). First comes one server without Ray, the same process count as one replica: the difference is
Ray's. Prints a line each: output tok/s, requests a second, median ms to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

PORT = 18700


@dataclass
class Tally:
    """The record of one run's streams."""

    name: str = ""
    seconds: float = 0.0
    num_tokens: int = 0
    num_requests: int = 0
    first_token_s: list[float] = field(default_factory=list)

    @property
    def row(self) -> str:
        """The run as a row of the table."""
        first_ms = 1e3 * statistics.median(self.first_token_s)
        return (
            f"| {self.name} | {self.num_tokens / self.seconds:,.0f} | "
            f"{self.num_requests / self.seconds:.1f} | {first_ms:.1f} |"
        )


async def stream(client: httpx.AsyncClient, prompt: str, max_tokens: int, tally: Tally) -> None:
    """One request, counted by its own usage."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = None
    usage = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line.startswith("data: "):
                first = time.perf_counter() - began
            if '"completion_tokens":' in line:
                usage = int(line.split('"completion_tokens":')[1].split(",")[0].rstrip("}"))
    tally.num_tokens += usage
    tally.num_requests += 1
    tally.first_token_s.append(first or 0.0)


async def load(name: str, url: str, concurrency: int, arguments: argparse.Namespace) -> Tally:
    """Keep ``concurrency`` streams under way, each a number of requests long."""
    tally = Tally(name)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def worker(number: int, count: int, into: Tally) -> None:
            for turn in range(count):
                prompt = f"{number}.{turn} " + "word " * arguments.input_len
                await stream(client, prompt, arguments.output_len, into)

        await asyncio.gather(*(worker(n, 1, Tally()) for n in range(concurrency)))
        began = time.perf_counter()
        await asyncio.gather(*(worker(n, arguments.turns, tally) for n in range(concurrency)))
        tally.seconds = time.perf_counter() - began
    return tally


def flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """octavo's, by name."""
    found = {"model": arguments.model, "device": arguments.device, "threads": arguments.threads}
    return {name: value for name, value in found.items() if value is not None}


def without_ray(arguments: argparse.Namespace) -> None:
    """One server of octavo's own."""
    words = [f"--{name}={value}" for name, value in flags(arguments).items()]
    command = [sys.executable, "-m", "octavo.serve", f"--port={PORT}", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if line.startswith("ready in"):
                break
        url = f"http://127.0.0.1:{PORT}"
        print(asyncio.run(load("no Ray", url, arguments.concurrency, arguments)).row, flush=True)
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, default=16, help="streams a replica")
    parser.add_argument("--input-len", type=int, default=64, help="words")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--turns", type=int, default=4, help="requests a stream")
    arguments = parser.parse_args()

    print("| replicas | output tok/s | requests/s | ms to the first token |\n|---|---|---|---|")
    without_ray(arguments)

    from ray import init, serve

    from octavo.ray import build_app

    init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT + 1})
    for count in arguments.replicas:
        app = build_app({**flags(arguments), "replica": {"num_replicas": count}})
        serve.run(app, name="octavo", route_prefix="/")
        url = f"http://127.0.0.1:{PORT + 1}"
        streams = count * arguments.concurrency
        print(asyncio.run(load(str(count), url, streams, arguments)).row, flush=True)
    serve.shutdown()


if __name__ == "__main__":
    main()
