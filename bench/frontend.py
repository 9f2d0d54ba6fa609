"""What the front end costs: octavo's own CPU time per chunk and per request, without a model.

    PYTHONPATH=python python bench/frontend.py [--repeat 3] [--markdown bench/results/frontend.md]

Serves with bench/instant_server.py in a process of its own and reads its threads' CPU time from
/proc, so that the client beside it does not count. The server's main thread is the front end: HTTP,
templates, tokenizing of short prompts, writing streams. Its other threads are the engine's loop
(scheduler, detokenizer, the bytes of each chunk) and the tokenizer's worker.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvloop

import instant_server
from octavo.bench.report import Report, add_arguments

HERE = Path(__file__).parent
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_STREAMS = 256
PACE_S = 0.02


class Cpu(NamedTuple):
    """CPU seconds: of the main thread, of that inside the kernel, of all other threads."""

    main: float
    kernel: float
    others: float

    def __sub__(self, before: Cpu) -> Cpu:
        """What was used since."""
        return Cpu(*(a - b for a, b in zip(self, before, strict=True)))


class Server:
    """bench/instant_server.py on a free port."""

    def __init__(self, pace_ms: float) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, str(HERE / "instant_server.py"), "--port", "0"),
                *("--pace-ms", str(pace_ms), "--max-num-seqs", str(NUM_STREAMS)),
                "--disable-log-stats",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := re.search(r"ready in .* on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(match[1])
                break
        else:
            sys.exit("the server did not start")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def cpu_s(self) -> Cpu:
        """CPU seconds so far."""
        main = others = kernel = 0.0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            if task.name == str(self._process.pid):
                main += seconds
                ticks = int((task / "stat").read_text().rpartition(")")[2].split()[12])
                kernel += ticks / os.sysconf("SC_CLK_TCK")
            else:
                others += seconds
        return Cpu(main, kernel, others)


class Client(asyncio.Protocol):
    """One connection that sends requests and counts what comes, as cheaply as Python can."""

    def __init__(self, on_end: Callable[[Client], None]) -> None:
        self._on_end = on_end
        self._tail = b""
        self.num_chunks = 0
        self.arrivals: list[float] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, path: str, body: dict[str, Any]) -> None:
        """Send one request; ``on_end`` is called at its end."""
        self._stream = bool(body.get("stream"))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)

    def data_received(self, data: bytes) -> None:
        """Count events; a whole answer ends with its one object, a stream with its last chunk."""
        if self.arrivals is not None:
            self.arrivals.append(time.perf_counter())
        if not self._stream:
            # The head and the body of so small an answer come in one or two parts.
            self._tail += data
            if self._tail.endswith(b"}"):
                assert self._tail.startswith(b"HTTP/1.1 200 "), self._tail
                self._tail = b""
                self._on_end(self)
            return
        self.num_chunks += data.count(b"data: {")
        self._tail = (self._tail + data)[-24:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            self._tail = b""
            self._on_end(self)


async def connect(port: int, on_end: Callable[[Client], None]) -> Client:
    """One connection."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(on_end), "127.0.0.1", port)
    return client


async def run_streams(port: int, num_tokens: int) -> tuple[int, float]:
    """(chunks, seconds) of NUM_STREAMS streams at once."""
    clients, over = await open_streams(port, num_tokens)
    began = time.perf_counter()
    await over.wait()
    seconds = time.perf_counter() - began
    return close_streams(clients), seconds


async def run_steadily(server: Server, seconds: float) -> tuple[int, Cpu]:
    """(chunks, CPU) of NUM_STREAMS streams in their midst: opening and ending them is not in it."""
    clients, over = await open_streams(server.port, int((seconds + 3) / PACE_S))
    await asyncio.sleep(1.5)
    before, num_before = server.cpu_s(), sum(client.num_chunks for client in clients)
    await asyncio.sleep(seconds)
    used, num_chunks = server.cpu_s() - before, sum(client.num_chunks for client in clients)
    await over.wait()
    close_streams(clients)
    return num_chunks - num_before, used


async def open_streams(port: int, num_tokens: int) -> tuple[list[Client], asyncio.Event]:
    """NUM_STREAMS connections that stream, and what is set when the last one ends."""
    over = asyncio.Event()
    running: set[Client] = set()

    def end(client: Client) -> None:
        running.discard(client)
        if not running:
            over.set()

    clients = [await connect(port, end) for _ in range(NUM_STREAMS)]
    running.update(clients)
    for client in clients:
        body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        client.ask(COMPLETION, body)
    return clients, over


def close_streams(clients: list[Client]) -> int:
    """How many chunks they got."""
    for client in clients:
        client.transport.close()
    return sum(client.num_chunks for client in clients)


def messages(number: int) -> list[dict[str, str]]:
    """A chat of about 200 tokens. Each begins differently: none is in the prefix cache."""
    return [
        {"role": "system", "content": f"You are helpful assistant number {number}."},
        {"role": "user", "content": instant_server.TEXT * 4},
    ]


def tokenizing_us() -> float:
    """What the tokenizer alone takes for such a chat."""
    tokenizer = instant_server.load_tokenizer()
    texts = ["".join(message["content"] for message in messages(i)) for i in range(500)]
    began = time.process_time()
    for text in texts:
        tokenizer.encode(text, False)
    return 1e6 * (time.process_time() - began) / len(texts)


async def run_requests(port: int, num_clients: int, num_requests: int) -> float:
    """Seconds for so many chat requests of about 200 tokens, one token said to each."""
    left = num_requests
    over = asyncio.Event()
    done = 0

    def ask(client: Client) -> None:
        nonlocal left
        left -= 1
        body = {"messages": messages(left), "max_tokens": 1, "ignore_eos": True}
        client.ask(CHAT, body)

    def end(client: Client) -> None:
        nonlocal done
        done += 1
        if left > 0:
            ask(client)
        if done == num_requests:
            over.set()

    clients = [await connect(port, end) for _ in range(num_clients)]
    began = time.perf_counter()
    for client in clients:
        ask(client)
    await over.wait()
    seconds = time.perf_counter() - began
    for client in clients:
        client.transport.close()
    return seconds


async def worst_gap_ms(port: int, seconds: float, prompt: str | None) -> float:
    """The longest silence of a stream, while another client sends ``prompt`` again and again."""
    over = asyncio.Event()
    stream = await connect(port, lambda client: over.set())
    stream.arrivals = []
    num_tokens = int(seconds / 0.002)
    body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    stream.ask(COMPLETION, body)
    if prompt is not None:
        answered = asyncio.Event()
        other = await connect(port, lambda client: answered.set())
        number = 0
        while not over.is_set():
            await asyncio.sleep(0.1)
            answered.clear()
            number += 1
            other.ask(COMPLETION, {"prompt": f"{number} {prompt}", "max_tokens": 1})
            await answered.wait()
        other.transport.close()
    await over.wait()
    stream.transport.close()
    arrivals = stream.arrivals[5:]
    return 1000 * max(b - a for a, b in itertools.pairwise(arrivals))


def measure(quick: bool) -> dict[str, float]:
    """Every figure once."""
    figures: dict[str, float] = {}
    scale = 4 if quick else 1
    with Server(pace_ms=1000 * PACE_S) as server:
        chunks, used = uvloop.run(run_steadily(server, 8 / scale))
        figures["front end, us per chunk (256 streams, 50 tokens/s each)"] = (
            1e6 * used.main / chunks
        )
        figures["of that outside the kernel"] = 1e6 * (used.main - used.kernel) / chunks
        figures["engine's own threads, us per chunk"] = 1e6 * used.others / chunks
    with Server(pace_ms=0) as server:
        uvloop.run(run_streams(server.port, 200))
        before = server.cpu_s()
        num_tokens = 4000 // scale
        chunks, seconds = uvloop.run(run_streams(server.port, num_tokens))
        used = server.cpu_s() - before
        tokens = NUM_STREAMS * num_tokens
        figures["tokens/s, 256 streams, as fast as it goes"] = tokens / seconds
        figures["tokens per chunk there"] = tokens / chunks
        figures["tokens/s of one core, both threads' time"] = tokens / (used.main + used.others)
        figures["tokens/s of one core, front end's time"] = tokens / used.main
        uvloop.run(run_requests(server.port, 16, 200))
        before = server.cpu_s()
        num_requests = 2000 // scale
        seconds = uvloop.run(run_requests(server.port, 16, num_requests))
        used = server.cpu_s() - before
        figures["front end, us per request (200-token chat)"] = 1e6 * used.main / num_requests
        figures["of that tokenizing"] = tokenizing_us()
        figures["engine's own threads, us per request"] = 1e6 * used.others / num_requests
        figures["requests/s, 16 clients"] = num_requests / seconds
    with Server(pace_ms=2) as server:
        prompt = "The quick brown fox jumps over the lazy dog again. " * 2900
        uvloop.run(worst_gap_ms(server.port, 1, None))
        quiet = uvloop.run(worst_gap_ms(server.port, 6 / scale, None))
        busy = uvloop.run(worst_gap_ms(server.port, 6 / scale, prompt))
        figures["longest gap of a 2 ms stream, ms"] = quiet
        figures["the same beside 32k-token prompts, ms"] = busy
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    add_arguments(parser)
    arguments = parser.parse_args()
    runs = [measure(arguments.quick) for _ in range(arguments.repeat)]
    settings = {"streams": NUM_STREAMS, "cores": len(os.sched_getaffinity(0))}
    report = Report(title=arguments.title or "Front end", settings=settings, runs=runs)
    print(report.text())
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.as_json(), indent=1))
    if arguments.markdown:
        with open(arguments.markdown, "a", encoding="utf-8") as file:
            file.write(report.markdown())


if __name__ == "__main__":
    main()
