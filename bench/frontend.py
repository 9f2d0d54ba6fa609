"""Cost of the front end: octavo's own CPU time per chunk and per request, without a model.

    PYTHONPATH=python python bench/frontend.py [--repeat 3] [--markdown bench/results/frontend.md]
        [--requests]

Serves with bench/instant_server.py in a process of its own and reads its threads' CPU time from
/proc, so that the client beside it does not count. The server's main thread is the front end: HTTP,
templates, tokenizing of short prompts, text and its chunks, writing streams. Its other threads are
the engine's loop (scheduler, stop rules) and the tokenizer's worker.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import uvloop

import instant_server
from octavo.bench.report import Report, add_arguments

HERE = Path(__file__).parent
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_STREAMS = 256
PACE_S = 0.02


class Cpu(NamedTuple):
    """CPU seconds: of the main thread, of all other threads."""

    main: float
    others: float

    def __sub__(self, before: Cpu) -> Cpu:
        """The use since then."""
        return Cpu(*(a - b for a, b in zip(self, before, strict=True)))


# A port of this machine, or a Unix socket's path.
Address = int | str
# A path and a body.
Request = tuple[str, dict[str, Any]]


class Process:
    """A server in a process of its own, which says on a line of its output where it listens."""

    def __init__(self, script: str, arguments: list[str], address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := re.search(address, line):
                self.address: Address = int(match[1]) if match[1].isdigit() else match[1]
                break
        else:
            sys.exit(f"{script} did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def cpu_s(self) -> Cpu:
        """CPU seconds so far."""
        main = others = 0.0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            if task.name == str(self._process.pid):
                main += seconds
            else:
                others += seconds
        return Cpu(main, others)


class Server(Process):
    """bench/instant_server.py on a free port, or on a Unix socket."""

    def __init__(self, pace_ms: float, uds: str | None = None) -> None:
        arguments = ["--pace-ms", str(pace_ms), "--max-num-seqs", str(NUM_STREAMS)]
        arguments += ["--disable-log-stats"]
        arguments += ["--port", "0"] if uds is None else ["--uds", uds]
        address = r"ready in .* on (?:http://127\.0\.0\.1:(?=\d)|unix:)(\S+)"
        super().__init__("instant_server.py", arguments, address)


class BareServer(Process):
    """bench/bare_server.py: the floor under the figures of streams."""

    def __init__(self, chunk_bytes: int, uds: str | None = None) -> None:
        arguments = ["--num-connections", str(NUM_STREAMS), "--chunk-bytes", str(chunk_bytes)]
        arguments += ["--pace-ms", str(1000 * PACE_S), *(() if uds is None else ("--uds", uds))]
        super().__init__("bare_server.py", arguments, r"(\S+)")


class Client(asyncio.Protocol):
    """One connection that sends requests and counts what comes, as cheaply as Python can."""

    def __init__(self, on_end: Callable[[Client], None]) -> None:
        self._on_end = on_end
        self._tail = b""
        self.num_chunks = self.num_bytes = 0
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
        self.num_bytes += len(data)
        self._tail = (self._tail + data)[-24:]
        if self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail:
            self._tail = b""
            self._on_end(self)


async def connect(address: Address, on_end: Callable[[Client], None]) -> Client:
    """One connection."""
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        return (await loop.create_unix_connection(lambda: Client(on_end), address))[1]
    return (await loop.create_connection(lambda: Client(on_end), "127.0.0.1", address))[1]


async def run_streams(address: Address, num_tokens: int) -> tuple[int, float]:
    """(chunks, seconds) of NUM_STREAMS streams at once."""
    clients, over = await open_streams(address, num_tokens)
    began = time.perf_counter()
    await over.wait()
    seconds = time.perf_counter() - began
    return close_streams(clients), seconds


class Steady(NamedTuple):
    """Of NUM_STREAMS streams in their midst: opening and ending them is not in it."""

    cpu: Cpu
    num_chunks: int
    num_bytes: int

    @property
    def main_us(self) -> float:
        """The main thread's time per chunk."""
        return 1e6 * self.cpu.main / self.num_chunks


async def run_steadily(server: Process, seconds: float) -> Steady:
    """Streams of PACE_S for so long. A bare server is asked for nothing: it writes anyway."""
    clients, over = await open_streams(server.address, int((seconds + 3) / PACE_S))

    def so_far() -> Steady:
        num_chunks = sum(client.num_chunks for client in clients)
        return Steady(server.cpu_s(), num_chunks, sum(client.num_bytes for client in clients))

    await asyncio.sleep(1.5)
    before = so_far()
    await asyncio.sleep(seconds)
    after = so_far()
    if isinstance(server, Server):
        await over.wait()
    close_streams(clients)
    num_chunks = after.num_chunks - before.num_chunks
    return Steady(after.cpu - before.cpu, num_chunks, after.num_bytes - before.num_bytes)


async def open_streams(address: Address, num_tokens: int) -> tuple[list[Client], asyncio.Event]:
    """NUM_STREAMS connections that stream, and what is set when the last one ends."""
    over = asyncio.Event()
    running: set[Client] = set()

    def end(client: Client) -> None:
        running.discard(client)
        if not running:
            over.set()

    clients = [await connect(address, end) for _ in range(NUM_STREAMS)]
    running.update(clients)
    for client in clients:
        body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        client.ask(COMPLETION, body)
    return clients, over


def close_streams(clients: list[Client]) -> int:
    """The number of chunks they got."""
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
    """The tokenizer's own time for such a chat."""
    tokenizer = instant_server.load_tokenizer()
    texts = ["".join(message["content"] for message in messages(i)) for i in range(500)]
    began = time.process_time()
    for text in texts:
        tokenizer.encode(text, False)
    return 1e6 * (time.process_time() - began) / len(texts)


def chat_request(number: int) -> Request:
    """A chat of about 200 tokens, one token said to it."""
    return CHAT, {"messages": messages(number), "max_tokens": 1, "ignore_eos": True}


def streamed_chat_request(number: int) -> Request:
    """The same as a stream, of two tokens."""
    return CHAT, {**chat_request(number)[1], "max_tokens": 2, "stream": True}


def completion_request(number: int) -> Request:
    """200 token ids, one token said to them."""
    ids = [5 + number % 4000, *range(100, 299)]
    return COMPLETION, {"prompt": ids, "max_tokens": 1, "ignore_eos": True}


KINDS: dict[str, Callable[[int], Request]] = {
    "200-token chat": chat_request,
    "200-token chat, streamed": streamed_chat_request,
    "200 token ids": completion_request,
}


async def run_requests(
    address: Address, num_clients: int, num_requests: int, make: Callable[[int], Request]
) -> float:
    """Seconds for so many requests."""
    left = num_requests
    over = asyncio.Event()
    done = 0

    def ask(client: Client) -> None:
        nonlocal left
        left -= 1
        client.ask(*make(left))

    def end(client: Client) -> None:
        nonlocal done
        done += 1
        if left > 0:
            ask(client)
        if done == num_requests:
            over.set()

    clients = [await connect(address, end) for _ in range(num_clients)]
    began = time.perf_counter()
    for client in clients:
        ask(client)
    await over.wait()
    seconds = time.perf_counter() - began
    for client in clients:
        client.transport.close()
    return seconds


async def worst_gap_ms(address: Address, seconds: float, prompt: str | None) -> float:
    """The longest silence of a stream, while another client sends ``prompt`` again and again."""
    over = asyncio.Event()
    stream = await connect(address, lambda client: over.set())
    stream.arrivals = []
    num_tokens = int(seconds / 0.002)
    body = {"prompt": "Once", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    stream.ask(COMPLETION, body)
    if prompt is not None:
        answered = asyncio.Event()
        other = await connect(address, lambda client: answered.set())
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


def measure_requests(scale: int) -> dict[str, float]:
    """The cost of a request on its way in and out, by kind."""
    figures: dict[str, float] = {}
    num_requests = 2000 // scale
    with Server(pace_ms=0) as server:
        for kind, make in KINDS.items():
            uvloop.run(run_requests(server.address, 16, 200, make))
            before = server.cpu_s()
            seconds = uvloop.run(run_requests(server.address, 16, num_requests, make))
            used = server.cpu_s() - before
            figures[f"front end, us per request ({kind})"] = 1e6 * used.main / num_requests
            figures[f"engine's own threads, us ({kind})"] = 1e6 * used.others / num_requests
            figures[f"requests/s, 16 clients ({kind})"] = num_requests / seconds
    figures["tokenizing of the chat, us"] = tokenizing_us()
    return figures


def measure(scale: int) -> dict[str, float]:
    """Every figure once."""
    figures: dict[str, float] = {}
    name = "us per chunk (256 streams, 50 tokens/s each)"
    with tempfile.TemporaryDirectory() as folder:
        for uds, where in ((None, ""), (f"{folder}/socket", ", Unix sockets")):
            with Server(1000 * PACE_S, uds) as server:
                steady = uvloop.run(run_steadily(server, 8 / scale))
            with BareServer(steady.num_bytes // steady.num_chunks, uds and f"{uds}2") as bare:
                floor = uvloop.run(run_steadily(bare, 4 / scale))
            figures[f"front end, {name}{where}"] = steady.main_us
            figures[f"a bare server that writes as many bytes{where}"] = floor.main_us
            figures[f"octavo's own: the difference{where}"] = steady.main_us - floor.main_us
            if uds is None:
                engine_us = 1e6 * steady.cpu.others / steady.num_chunks
                figures["engine's own threads, us per chunk"] = engine_us
    with Server(pace_ms=0) as server:
        uvloop.run(run_streams(server.address, 200))
        before = server.cpu_s()
        num_tokens = 4000 // scale
        chunks, seconds = uvloop.run(run_streams(server.address, num_tokens))
        used = server.cpu_s() - before
        tokens = NUM_STREAMS * num_tokens
        figures["tokens/s, 256 streams, as fast as it goes"] = tokens / seconds
        figures["tokens per chunk there"] = tokens / chunks
        figures["tokens/s of one core, both threads' time"] = tokens / (used.main + used.others)
        figures["tokens/s of one core, front end's time"] = tokens / used.main
    figures |= measure_requests(scale)
    with Server(pace_ms=2) as server:
        prompt = "The quick brown fox jumps over the lazy dog again. " * 2900
        uvloop.run(worst_gap_ms(server.address, 1, None))
        quiet = uvloop.run(worst_gap_ms(server.address, 6 / scale, None))
        busy = uvloop.run(worst_gap_ms(server.address, 6 / scale, prompt))
        figures["longest gap of a 2 ms stream, ms"] = quiet
        figures["the same beside 32k-token prompts, ms"] = busy
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--requests", action="store_true", help="only what a request costs")
    add_arguments(parser)
    arguments = parser.parse_args()
    run = measure_requests if arguments.requests else measure
    runs = [run(4 if arguments.quick else 1) for _ in range(arguments.repeat)]
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
