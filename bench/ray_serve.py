"""Throughput over the number of replicas on Ray, and what Ray adds to a request.

    python bench/ray_serve.py --model MODEL --replicas 1 2 4 --concurrency 64
    python bench/ray_serve.py --instant --pace-ms 25 --replicas 1 2 4 --concurrency 8

Each number of replicas is deployed anew and gets its share of the load (``concurrency`` streams
each). First comes one server without Ray: the difference to one replica is Ray's. ``--instant``
puts bench/instant_server.py's runner in the model's place, whose step lasts ``--pace-ms`` and takes
no processor meanwhile, as one on a GPU: what limits then is octavo's and Ray's own work.

A line each: output tok/s, requests a second, median ms to the first token, and how many cores all
of it took, the clients' work included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from octavo.bench.stream_client import StreamClient, StreamTiming
from octavo.config import EngineConfig
from octavo.ray.replica import Replica
from octavo.server.http.config import ServerConfig

BENCH = Path(__file__).parent
PORT = 18700


class InstantReplica(Replica):
    """A Replica without a model."""

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, engine_config: EngineConfig, server_config: ServerConfig
    ) -> None:
        from instant_server import install

        install(float(os.environ["PACE_MS"]) / 1e3)
        await super().__init__(engine_config, server_config)


def worked_s() -> float:
    """Processor seconds of this process and all below it, Ray's among them."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold blanks: state, parent, ..., utime and stime.
            words = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(folder.name)] = int(words[1])
        ticks[int(folder.name)] = int(words[11]) + int(words[12])

    def is_ours(pid: int) -> bool:
        while pid not in (0, os.getpid()):
            pid = parents.get(pid, 0)
        return pid != 0

    return sum(ticks[pid] for pid in ticks if is_ours(pid)) / os.sysconf("SC_CLK_TCK")


async def worker(url: str, name: str, count: int, arguments: argparse.Namespace) -> list[Any]:
    """One stream after the other on one connection."""
    client = StreamClient(url)
    timings: list[StreamTiming] = []
    for turn in range(count):
        body = {
            "prompt": f"{name}.{turn} " + "word " * arguments.input_len,
            "max_tokens": arguments.output_len,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timings.append(await client.stream("/v1/completions", orjson.dumps(body), 600))
    client.close()
    return timings


async def load(url: str, concurrency: int, arguments: argparse.Namespace) -> str:
    """The table's columns for ``concurrency`` streams under way at any time."""

    async def everyone(count: int, name: str) -> list[StreamTiming]:
        work = (worker(url, f"{name}{n}", count, arguments) for n in range(concurrency))
        return [timing for timings in await asyncio.gather(*work) for timing in timings]

    await everyone(1, "warm-up ")
    began, worked = time.perf_counter(), worked_s()
    timings = await everyone(arguments.turns, "")
    seconds, worked = time.perf_counter() - began, worked_s() - worked
    if errors := [timing.error for timing in timings if timing.error]:
        raise RuntimeError(errors[0])
    first_ms = 1e3 * statistics.median(t.first_s - t.start_s for t in timings if t.first_s)
    return (
        f"{sum(t.num_output_tokens for t in timings) / seconds:,.0f} | "
        f"{len(timings) / seconds:.1f} | {first_ms:.1f} | {worked / seconds:.2f}"
    )


def flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """octavo's, by name."""
    names = ("model", "device", "threads", "max_num_seqs")
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def without_ray(arguments: argparse.Namespace) -> Iterator[str]:
    """The address of one server of octavo's own."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags(arguments).items()]
    program = ["-m", "octavo.serve"]
    if arguments.instant:
        program = [str(BENCH / "instant_server.py"), f"--pace-ms={arguments.pace_ms}"]
    command = [sys.executable, *program, f"--port={PORT}", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if line.startswith("ready in"):
                break
        yield f"http://127.0.0.1:{PORT}"
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def with_ray(arguments: argparse.Namespace) -> Iterator[str]:
    """The address of Ray's proxy."""
    from ray import init, serve

    paths = [str(BENCH), str(BENCH.parent / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PACE_MS": str(arguments.pace_ms),
        "OMP_NUM_THREADS": "1",
    }
    init(
        include_dashboard=False,
        log_to_driver=False,
        # By Ray's counting: replicas that take no processor may be more than there are.
        num_cpus=max(os.cpu_count() or 1, *arguments.replicas) if arguments.instant else None,
        runtime_env={"env_vars": environment},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT + 1})
    yield f"http://127.0.0.1:{PORT + 1}"
    serve.shutdown()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--instant", action="store_true", help="no model")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="a step without a model")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--no-prefix-routing", dest="prefix_routing", action="store_false")
    parser.add_argument("--concurrency", type=int, default=16, help="streams a replica")
    parser.add_argument("--input-len", type=int, default=64, help="words")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--turns", type=int, default=4, help="requests a stream")
    arguments = parser.parse_args()
    if arguments.instant:
        arguments.device = "cpu"

    print(
        "| replicas | output tok/s | requests/s | ms to the first token | cores |\n"
        "|---|---|---|---|---|"
    )
    with without_ray(arguments) as url:
        row = asyncio.run(load(url, arguments.concurrency, arguments))
        print(f"| no Ray | {row} |", flush=True)
    with with_ray(arguments) as url:
        for count in arguments.replicas:
            deploy(count, arguments)
            row = asyncio.run(load(url, count * arguments.concurrency, arguments))
            print(f"| {count} | {row} |", flush=True)


def deploy(count: int, arguments: argparse.Namespace) -> None:
    """Put so many replicas in place of those that there are."""
    from ray import serve

    from octavo.ray import builder

    if arguments.instant:
        replaced: Any = builder
        replaced.Replica = InstantReplica
    app = builder.build_app(
        {
            **flags(arguments),
            "prefix_routing": arguments.prefix_routing,
            "replica": {"num_replicas": count},
            "ingress": {"num_replicas": arguments.ingresses},
        }
    )
    serve.run(app, name="octavo", route_prefix="/")


if __name__ == "__main__":
    main()
