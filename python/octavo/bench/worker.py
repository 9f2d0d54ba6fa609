"""One process of the load generator: ``python -m octavo.bench.worker``.

It speaks JSON lines with ``octavo.bench.serve``: a Job on stdin, ``{"ready": ...}`` back once it is
connected and warm, a start time in, the timings out. Request numbers come from a pipe that all
workers share, so that the last requests are spread over all of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop

from octavo.bench.stream_client import StreamClient, StreamTiming
from octavo.bench.workload import Workload

# Request numbers travel as four bytes each: reads of a pipe that small are never torn.
INDEX_BYTES = 4
# Warm-up prompts come from numbers no measured request has, so they leave nothing in its cache.
WARMUP_BASE = 2**31


@dataclass(frozen=True, kw_only=True)
class Job:
    """One worker's share of the load.

    ``request_rate`` None: as fast as ``concurrency`` streams allow.
    """

    base_url: str
    api_key: str | None
    workload: dict[str, Any]
    worker: int
    num_workers: int
    # Streams of this worker.
    concurrency: int
    request_rate: float | None
    num_warmups: int
    # The shared pipe's read end; unused with a request rate.
    index_fd: int
    timeout_s: float


class Worker:
    """Runs one Job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workload = Workload(**job.workload)
        chat = self.workload.endpoint == "chat"
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self.idle = [StreamClient(job.base_url, job.api_key) for _ in range(job.concurrency)]
        self.results: list[tuple[int, StreamTiming]] = []

    async def prepare(self) -> str | None:
        """Connect every stream and send the warm-up requests; the first error, if any."""
        await asyncio.gather(*(client.connect() for client in self.idle))
        job = self.job
        numbers = iter(range(job.worker, job.num_warmups, job.num_workers))

        async def warm(client: StreamClient) -> str | None:
            for number in numbers:
                # 16 tokens reach every path of a decode step.
                body = self.workload.body(
                    WARMUP_BASE + number, min(self.workload.lengths(number)[1], 16)
                )
                timing = await client.stream(self.path, body, job.timeout_s)
                if timing.error:
                    return timing.error
            return None

        errors = await asyncio.gather(*(warm(client) for client in self.idle))
        return next((error for error in errors if error), None)

    async def _request(self, client: StreamClient, index: int, body: bytes) -> None:
        timing = await client.stream(self.path, body, self.job.timeout_s)
        self.results.append((index, timing))

    async def _keep_busy(self, client: StreamClient, start_s: float) -> None:
        """One stream: the next request leaves as soon as the last one is answered."""
        index = self._next_index()
        body = self.workload.body(index) if index is not None else b""
        await asyncio.sleep(start_s - time.monotonic())
        while index is not None:
            await self._request(client, index, body)
            index = self._next_index()
            body = self.workload.body(index) if index is not None else b""

    def _next_index(self) -> int | None:
        data = os.read(self.job.index_fd, INDEX_BYTES)
        return int.from_bytes(data, "little") if data else None

    async def _on_schedule(self, request_rate: float, start_s: float) -> None:
        """Requests leave at their Poisson times, unless all streams are busy."""
        job = self.job
        free = asyncio.Semaphore(job.concurrency)

        async def send(index: int, body: bytes) -> None:
            async with free:
                client = self.idle.pop()
                try:
                    await self._request(client, index, body)
                finally:
                    self.idle.append(client)

        async with asyncio.TaskGroup() as tasks:
            arrivals = self.workload.arrivals_s(request_rate)
            for index in range(job.worker, len(arrivals), job.num_workers):
                body = self.workload.body(index)
                await asyncio.sleep(max(0.0, start_s + arrivals[index] - time.monotonic()))
                tasks.create_task(send(index, body))

    async def run(self, start_s: float) -> dict[str, Any]:
        """Send the requests from ``start_s`` (time.monotonic()) on; the report for the parent."""
        cpu_s = time.process_time()
        clients = list(self.idle)
        if self.job.request_rate is None:
            await asyncio.gather(*(self._keep_busy(client, start_s) for client in clients))
        else:
            await self._on_schedule(self.job.request_rate, start_s)
        wall_s = max(time.monotonic() - start_s, 1e-9)
        for client in clients:
            client.close()
        return {
            "cpu_share": (time.process_time() - cpu_s) / wall_s,
            "results": [
                {"index": index, **dataclasses.asdict(timing)} for index, timing in self.results
            ],
        }


def main() -> None:
    """Serve one Job from stdin."""
    job = Job(**orjson.loads(sys.stdin.buffer.readline()))

    def say(value: Any) -> None:
        sys.stdout.buffer.write(orjson.dumps(value) + b"\n")
        sys.stdout.buffer.flush()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        worker = Worker(job)
        try:
            error = runner.run(worker.prepare())
        except OSError as os_error:
            error = str(os_error)
        say({"ready": error is None, "error": error})
        # No line: the parent gave up.
        start = sys.stdin.buffer.readline()
        if start:
            say(runner.run(worker.run(orjson.loads(start))))


if __name__ == "__main__":
    main()
