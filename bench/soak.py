"""A long rough ride: many clients, cancels, bad requests and reconnects, and what is left of it.

    PYTHONPATH=python python bench/soak.py [--minutes 10] [--clients 64] [--markdown FILE]
        [--server "MODEL --flag ..."]

Starts ``octavo serve`` (by default a tiny model with random weights, so that as many requests as
possible pass, and so few blocks that some are preempted all the time) and watches it from outside:
resident memory by /proc, file descriptors, threads, /metrics and /load. A model that embeds gets
texts to embed and to score. The first quarter is warm-up; from then on a line is fitted through the
memory. Exit status 1 if an answer is wrong, anything is left or memory grows by ``--max-slope`` MiB
a minute.

Clients have no clock: how long an answer takes is the machine's matter, and what else runs there.
An answer is wrong where the server computes more tokens meanwhile than all clients' requests could
need, or computes none for STILL_S.
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
from collections.abc import Coroutine
from dataclasses import dataclass, field
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
# Of one request: three samples of 128 tokens after a prompt of some 60 words, and texts to embed.
MAX_REQUEST_TOKENS = 1500
# Requests that clients have left may still be there for a moment: there are more than clients.
MAX_REQUESTS_A_CLIENT = 4
# A step of a small model takes milliseconds; a machine that is paused for another's measurement
# stands still for 100 s (what bench/NOTES.md calls a quiet run).
STILL_S = 180
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

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics by name."""
        return numbers(httpx.get(f"{self.url}/metrics", timeout=STILL_S).text)

    def task(self) -> str:
        """The model's task."""
        models: list[dict[str, str]] = httpx.get(f"{self.url}/v1/models").json()["data"]
        return models[0]["task"]

    def gauges(self) -> dict[str, float]:
        """The gauges that are 0 when nothing runs."""
        found = self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        load: float = httpx.get(f"{self.url}/load").json()["server_load"]
        return {name: found[name] for name in names} | {"server_load": load}


def numbers(text: str) -> dict[str, float]:
    """The numbers of a page of metrics by name; of several labels the last one's."""
    found = re.findall(r"^vllm:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


class Progress:
    """The tokens that a server has computed, as /metrics has them."""

    def __init__(self) -> None:
        self.num_tokens = 0.0
        self.changed_s = time.monotonic()

    async def follow(self, url: str, until: asyncio.Event) -> None:
        """Look twice a second, until the event."""
        async with httpx.AsyncClient(base_url=url, timeout=STILL_S) as http:
            while not until.is_set():
                found = numbers((await http.get("/metrics")).text)
                tokens = found["prompt_tokens_total"] + found["generation_tokens_total"]
                # A pooling model's texts are counted as steps.
                tokens += found.get("iteration_tokens_total_sum", 0)
                if tokens != self.num_tokens:
                    self.num_tokens, self.changed_s = tokens, time.monotonic()
                await asyncio.sleep(0.5)

    async def fault(self, num_clients: int) -> str:
        """Return once a request that begins now is wrong not to have ended; what is wrong."""
        began, began_s = self.num_tokens, time.monotonic()
        most = num_clients * MAX_REQUESTS_A_CLIENT * MAX_REQUEST_TOKENS * 2
        while self.num_tokens - began < most:
            if time.monotonic() - max(self.changed_s, began_s) > STILL_S:
                return "WRONG: the server stands still"
            await asyncio.sleep(0.5)
        return "WRONG: no end, though the server runs on"


def random_texts(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(path, body) of a good request for a model that embeds."""
    texts = [
        " ".join(rng.choices(["alpha", "beta", "gamma", "東京"], k=rng.randint(1, 60)))
        for _ in range(rng.randint(2, 8))
    ]
    if rng.random() < 0.3:
        return "/rerank", {"query": texts[0], "documents": texts[1:]}
    return "/v1/embeddings", {
        "input": texts,
        "encoding_format": rng.choice(["float", "base64"]),
        "truncate_prompt_tokens": -1,
    }


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


@dataclass
class Ride:
    """One ride: what its clients share. ``counts``: what became of the requests."""

    url: str
    task: str
    num_clients: int
    until: float
    progress: Progress = field(default_factory=Progress)
    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    async def be_a_client(self, seed: int) -> None:
        """One client: good requests, requests it leaves in the middle, bad ones, reconnects."""
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            # Patience is counted in the server's tokens, not in seconds.
            async with httpx.AsyncClient(base_url=self.url, timeout=None) as http:
                for _ in range(rng.randint(1, 20)):
                    if time.monotonic() >= self.until:
                        return
                    kind = rng.random()
                    if kind < 0.1:
                        await self._finish(refused(http, rng))
                        continue
                    path, body = (random_request if self.task == "generate" else random_texts)(rng)
                    if kind < 0.35:
                        await self._leave(ask(http, path, body), rng.uniform(0, 0.3))
                        # The connection was in use: leaving closes it.
                        break
                    await self._finish(ask(http, path, body))

    async def _finish(self, request: Coroutine[Any, Any, str]) -> None:
        """Wait for a request's end, or for the proof that it should have come."""
        began_s = time.monotonic()
        asked = asyncio.create_task(request)
        fault = asyncio.create_task(self.progress.fault(self.num_clients))
        await asyncio.wait((asked, fault), return_when=asyncio.FIRST_COMPLETED)
        self.counts[(asked if asked.done() else fault).result()] += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
        for task in (asked, fault):
            task.cancel()

    async def _leave(self, request: Coroutine[Any, Any, str], patience_s: float) -> None:
        try:
            self.counts[await asyncio.wait_for(request, patience_s)] += 1
        except TimeoutError:
            self.counts["left"] += 1


async def refused(http: httpx.AsyncClient, rng: random.Random) -> str:
    """Send a bad request; what became of it."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    status = (await http.post(path, json=rng.choice(BAD))).status_code
    return "refused" if status == 400 else f"WRONG: bad, {status}"


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """Send one good request and read its whole answer; what became of it."""
    if not body.get("stream"):
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


async def ride(server: Server, arguments: argparse.Namespace) -> tuple[Ride, float, list[float]]:
    """(what became of it, MiB a minute after warm-up, MiB at the eighths of the time)."""
    samples: list[tuple[float, float]] = []
    began = time.monotonic()
    until = began + 60 * arguments.minutes
    shared = Ride(server.url, server.task(), arguments.clients, until)
    is_over = asyncio.Event()
    follower = asyncio.create_task(shared.progress.follow(server.url, is_over))
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(server, until, samples))
        for number in range(arguments.clients):
            group.create_task(shared.be_a_client(arguments.seed * 1000 + number))
    is_over.set()
    await follower
    warm = np.array([s for s in samples if s[0] >= began + 15 * arguments.minutes])
    slope, _ = np.polyfit(warm[:, 0] / 60, warm[:, 1], 1)
    eighths = [samples[i * (len(samples) - 1) // 8][1] for i in range(9)]
    return shared, float(slope), eighths


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
            # So few blocks that all have been written before the measuring begins, and that
            # requests are preempted.
            words += ["--kv-cache-memory-bytes", "600K"]
        server = Server(words)
        # As it is once every kind of request has been seen.
        first = argparse.Namespace(**vars(arguments) | {"minutes": 0.1})
        uvloop.run(ride(server, first))
        settle(server)
        before = (server.num_fds(), server.num_threads())
        shared, slope, rss = uvloop.run(ride(server, arguments))
        gauges = settle(server)
        preemptions = server.metrics().get("num_preemptions_total", 0)
        time.sleep(1)
        after = (server.num_fds(), server.num_threads())
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
    faults = [line for line in server.errors if "Traceback" in line or " ERROR " in line]
    rows = {
        "clients": arguments.clients,
        "minutes": arguments.minutes,
        **{f"requests {name}": count for name, count in sorted(shared.counts.items())},
        "the slowest answer, s": round(shared.slowest_s, 1),
        "preemptions": preemptions,
        "resident memory at each eighth, MiB": ", ".join(f"{mib:.1f}" for mib in rss),
        "its slope after a quarter, MiB/min": round(slope, 3),
        "file descriptors before, after": f"{before[0]}, {after[0]}",
        "threads before, after": f"{before[1]}, {after[1]}",
        **gauges,
        "errors in the log": len(faults),
        "exit status on SIGTERM": status,
    }
    is_well = (
        not any(name.startswith("WRONG") for name in shared.counts)
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
