"""A long rough ride: many clients, cancels, bad requests and reconnects, and what is left of it.

    PYTHONPATH=python python bench/soak.py [--minutes 10] [--clients 64] [--markdown FILE]
        [--server "MODEL --flag ..."]

Starts ``octavo serve`` (by default a tiny model with random weights, so that as many requests as
possible pass) and watches it from outside: resident memory by /proc, file descriptors, threads,
/metrics and /load. The first quarter is warm-up; from then on a line is fitted through the memory.
Exit status 1 if anything is left or memory grows by ``--max-slope`` MiB a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop

from octavo.bench import environment

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
BAD: list[dict[str, Any]] = [
    {"prompt": "x", "temperature": 9},
    {"prompt": []},
    {"prompt": "x " * 5000},
    {"prompt": "x", "no_such_field": 1},
    {"messages": [{"role": "user"}]},
]


class Server:
    """``octavo serve`` with these words on a free port."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo.serve", *words, "--port", "0", "--disable-log-stats"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"^ready in .* on (http://\S+)", line):
                self.url = match[1]
                break
        else:
            sys.exit("the server did not start")
        self.errors: list[str] = []
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(line.rstrip("\n") for line in self.process.stderr)

    def rss_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) / 1024

    def num_fds(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def num_threads(self) -> int:
        """Threads."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def gauges(self) -> dict[str, float]:
        """The gauges that are 0 when nothing runs."""
        text = httpx.get(f"{self.url}/metrics").text
        found = {
            name: float(value)
            for name, value in re.findall(r"^vllm:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)
        }
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        load: float = httpx.get(f"{self.url}/load").json()["server_load"]
        return {name: found[name] for name in names} | {"server_load": load}


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(path, body) of a good request of random size."""
    words = " ".join(rng.choices(["alpha", "beta", "gamma", "東京", "🦊"], k=rng.randint(1, 60)))
    body: dict[str, Any] = {
        "max_tokens": rng.choice([1, 8, 32, 128]),
        "temperature": rng.choice([0, 0.8]),
        "stream": rng.random() < 0.6,
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.15:
        body["n"] = rng.randint(2, 3)
    if rng.random() < 0.15:
        body["stop"] = ["1", "\n\n"]
    if rng.random() < 0.15:
        body["frequency_penalty"] = 0.5
    if rng.random() < 0.5:
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}
    if rng.random() < 0.2:
        body |= {"logprobs": 2, "echo": rng.random() < 0.5}
    return "/v1/completions", body | {"prompt": words}


async def be_a_client(url: str, seed: int, until: float, counts: Counter[str]) -> None:
    """One client: good requests, requests it leaves in the middle, bad ones, reconnects."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for _ in range(rng.randint(1, 20)):
                if time.monotonic() >= until:
                    return
                kind = rng.random()
                if kind < 0.1:
                    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
                    answer = await http.post(path, json=rng.choice(BAD))
                    status = answer.status_code
                    counts["refused" if status == 400 else f"WRONG: bad, {status}"] += 1
                    continue
                path, body = random_request(rng)
                patience = rng.uniform(0, 0.3) if kind < 0.35 else 100
                try:
                    counts[await asyncio.wait_for(ask(http, path, body), patience)] += 1
                except TimeoutError:
                    # The connection was in use: leaving closes it.
                    counts["left" if patience < 1 else "WRONG: no end in time"] += 1
                    break


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """Send one good request and read its whole answer; what became of it."""
    if not body["stream"]:
        answer = await http.post(path, json=body)
        status = answer.status_code
        return "answered" if status == 200 else f"WRONG: good, {status}"
    async with http.stream("POST", path, json=body) as response:
        last = ""
        async for line in response.aiter_lines():
            last = line or last
    if response.status_code == 200 and last == "data: [DONE]":
        return "streamed"
    return f"WRONG: stream, {response.status_code}"


async def watch(server: Server, until: float, samples: list[tuple[float, float]]) -> None:
    """Resident memory every two seconds."""
    while time.monotonic() < until:
        samples.append((time.monotonic(), server.rss_mib()))
        await asyncio.sleep(2)


async def ride(
    server: Server, arguments: argparse.Namespace
) -> tuple[Counter[str], float, list[float]]:
    """(what became of the requests, MiB a minute after warm-up, MiB at the eighths of the time)."""
    counts: Counter[str] = Counter()
    samples: list[tuple[float, float]] = []
    began = time.monotonic()
    until = began + 60 * arguments.minutes
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(server, until, samples))
        for number in range(arguments.clients):
            seed = arguments.seed * 1000 + number
            group.create_task(be_a_client(server.url, seed, until, counts))
    warm = np.array([s for s in samples if s[0] >= began + 15 * arguments.minutes])
    slope, _ = np.polyfit(warm[:, 0] / 60, warm[:, 1], 1)
    eighths = [samples[i * (len(samples) - 1) // 8][1] for i in range(9)]
    return counts, float(slope), eighths


def settle(server: Server) -> dict[str, float]:
    """The gauges once the last cancelled requests are over."""
    for _ in range(100):
        gauges = server.gauges()
        if not any(gauges.values()):
            break
        time.sleep(0.1)
    return gauges


def main() -> int:
    """Ride, look back, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MiB a minute")
    parser.add_argument("--server", default=None, help="words of octavo serve")
    parser.add_argument("--markdown", metavar="FILE", help="append the outcome")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(arguments.server or "")
        if not words:
            (Path(folder) / "config.json").write_text(json.dumps(MODEL))
            (Path(folder) / "chat.jinja").write_text(TEMPLATE)
            words = [folder, "--load-format", "dummy", "--chat-template", f"{folder}/chat.jinja"]
            # So few blocks that all have been written before the measuring begins.
            words += ["--kv-cache-memory-bytes", "8M"]
        server = Server(words)
        # As it is once every kind of request has been seen.
        first = argparse.Namespace(**vars(arguments) | {"minutes": 0.1})
        uvloop.run(ride(server, first))
        settle(server)
        before = (server.num_fds(), server.num_threads())
        counts, slope, rss = uvloop.run(ride(server, arguments))
        gauges = settle(server)
        time.sleep(1)
        after = (server.num_fds(), server.num_threads())
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
    faults = [line for line in server.errors if "Traceback" in line or " ERROR " in line]
    rows = {
        "clients": arguments.clients,
        "minutes": arguments.minutes,
        **{f"requests {name}": count for name, count in sorted(counts.items())},
        "resident memory at each eighth, MiB": ", ".join(f"{mib:.1f}" for mib in rss),
        "its slope after a quarter, MiB/min": round(slope, 3),
        "file descriptors before, after": f"{before[0]}, {after[0]}",
        "threads before, after": f"{before[1]}, {after[1]}",
        **gauges,
        "errors in the log": len(faults),
        "exit status on SIGTERM": status,
    }
    is_well = (
        not any(name.startswith("WRONG") for name in counts)
        and not any(gauges.values())
        and slope < arguments.max_slope
        # A connection that is just closing may still be there.
        and after[0] <= before[0] + 2
        # The pool of asyncio.to_thread is filled by and by.
        and after[1] <= before[1] + min(32, (os.cpu_count() or 1) + 4)
        and not faults
        and status == 0
    )
    rows["verdict"] = "nothing is left" if is_well else "NOT WELL"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    print("\n".join(lines), *faults[:5], sep="\n")
    if arguments.markdown:
        head = f"\n{environment.machine()}; commit {environment.commit()}\n\n"
        head += f"    {environment.command_line()}\n\n| | |\n|---|---|\n"
        with open(arguments.markdown, "a", encoding="utf-8") as file:
            file.write(head + "\n".join(lines) + "\n")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
