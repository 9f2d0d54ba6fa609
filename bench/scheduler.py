"""Cost of the scheduler: schedule + update per step, in microseconds, seen from Python.

    PYTHONPATH=python python bench/scheduler.py

Steady decode: every request holds ~1k tokens of context in blocks of 16, prefix caching is on,
one token a step each, nothing is delivered until the end. Three tables: by running requests; by
requests that wait; by blocks in the pool. Each figure is the median of ``--rounds`` rounds of
``--steps`` steps, with the fastest and slowest round beside it.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from octavo._core import EngineCore, Staging
from octavo.config import EngineConfig

BLOCK_SIZE = 16
CONTEXT = 1024
MAX_MODEL_LEN = 8192
MAX_NUM_BATCHED_TOKENS = 8192


class Bench:
    """An engine in steady decode, ``depth`` steps in flight."""

    def __init__(
        self, num_running: int, num_waiting: int, num_blocks: int, depth: int, context: int
    ) -> None:
        self.core = EngineCore(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            max_step_ms=EngineConfig.max_step_ms,
        )
        length = Staging.required_len(
            MAX_NUM_BATCHED_TOKENS, num_running, MAX_MODEL_LEN, BLOCK_SIZE
        )
        self.stagings = [Staging(np.zeros(length, np.int32)) for _ in range(depth)]
        rng = np.random.default_rng(0)
        for request_id in range(num_running + num_waiting):
            # Spread over a block, so that each step a 16th of the requests needs a new one.
            prompt = rng.integers(0, 32000, context + request_id % BLOCK_SIZE, dtype=np.int32)
            self.core.add_request([request_id], prompt, max_tokens=MAX_MODEL_LEN)
        self.tokens = rng.integers(0, 32000, (64, num_running), dtype=np.int32)
        while self.core.stats()["num_running"] < num_running:
            self._prefill()
        for _ in range(4):
            self._prefill()
        self.in_flight = []
        for staging in self.stagings[1:]:
            self.in_flight.append(self.core.schedule(staging))

    def _prefill(self) -> None:
        batch = self.core.schedule(self.stagings[0])
        assert batch is not None
        self.core.update(batch.step_id, self.tokens[0, : batch.num_samples].copy())

    def run(self, num_steps: int) -> float:
        """Seconds per step."""
        schedule, update = self.core.schedule, self.core.update
        in_flight, stagings, tokens = self.in_flight, self.stagings, self.tokens
        depth = len(stagings)
        start = time.perf_counter()
        for step in range(num_steps):
            in_flight.append(schedule(stagings[(step + depth - 1) % depth]))
            update(in_flight.pop(0).step_id, tokens[step % 64])
        return (time.perf_counter() - start) / num_steps


def measure(args: argparse.Namespace, num_running: int, **kwargs: int) -> str:
    context = kwargs.pop("context", CONTEXT)
    num_blocks = kwargs.pop("num_blocks", num_running * (context + 3072) // BLOCK_SIZE + 64)
    bench = Bench(num_running, kwargs.pop("num_waiting", 0), num_blocks, args.depth, context)
    bench.run(args.steps)
    gc.collect()
    rounds = [bench.run(args.steps) * 1e6 for _ in range(args.rounds)]
    assert bench.core.stats()["num_running"] == num_running
    bench.core.check_integrity()
    return f"{statistics.median(rounds):8.1f}   ({min(rounds):.1f} - {max(rounds):.1f})"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=2, help="steps in flight: 2 is run-ahead")
    args = parser.parse_args()
    print(f"{cpu_name()}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"schedule + update, us per step: median (fastest - slowest of {args.rounds} rounds)\n")

    print("running requests, ~1k context")
    for num_running in (1, 64, 256, 1024):
        print(f"{num_running:8}  {measure(args, num_running)}")
    print("\nwaiting requests, 256 running")
    for num_waiting in (0, 1_000, 10_000):
        print(f"{num_waiting:8}  {measure(args, 256, num_waiting=num_waiting)}")
    print("\nblocks in the pool, 4 running, 32 tokens of context at first")
    for num_blocks in (1_024, 4_096, 16_384, 65_536):
        print(f"{num_blocks:8}  {measure(args, 4, num_blocks=num_blocks, context=32)}")


if __name__ == "__main__":
    main()
