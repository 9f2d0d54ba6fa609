"""Times between tokens beside prompts, and tokens a second, by ``--max-step-ms``: in process.

    PYTHONPATH=python python bench/long_prompts.py --model bench/configs/llama-3.1-8b \
        --load-format dummy --max-model-len 16384 --limits 0 10 20

``long``: 8 requests decode while prompts of 8,000 tokens come, one after the other. Others, as
512/256x64: so many requests at a time of 512 tokens, each with 256 of answer; four times as many in
all. A line for each load and limit: the distance of a decoding request's tokens (median, 99th
percentile), the time to the first token (of the long prompts, where there are any), output tokens
a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from octavo._core import TokenIds
from octavo.bench import offline
from octavo.engine.engine_loop import EngineLoop
from octavo.engine.make_core import make_core
from octavo.sampling_params import SamplingParams


@dataclass
class Load:
    """Requests of one kind, ``concurrency`` at a time; beside them long ones, one at a time,
    ``every_s`` after the last one's token."""

    name: str
    input_len: int
    output_len: int
    concurrency: int
    num_requests: int
    long_len: int = 0
    every_s: float = 0.0

    @classmethod
    def parse(cls, name: str, args: argparse.Namespace) -> Load:
        """``long``, or INPUTxOUTPUT at a time."""
        if name == "long":
            return cls(
                name,
                args.input_len,
                args.output_len,
                args.streams,
                args.streams,
                args.long_len,
                args.every,
            )
        match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", name)
        if match is None:
            raise argparse.ArgumentTypeError(f"{name} is neither long nor like 512/256x64")
        length, answer, concurrency = map(int, match.groups())
        return cls(name, length, answer, concurrency, args.waves * concurrency)


@dataclass
class Times:
    """Times at which the tokens of one run came."""

    gaps_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    elapsed_s: float = 0.0

    def line(self) -> str:
        """As printed."""
        gaps = sorted(self.gaps_s)
        median, last = gaps[len(gaps) // 2] * 1e3, gaps[int(len(gaps) * 0.99)] * 1e3
        first = statistics.median(self.first_s) * 1e3
        return (
            f"ITL p50 {median:.2f} ms, p99 {last:.2f} ({last / median:.1f} times), "
            f"TTFT p50 {first:.0f} ms, {self.num_tokens / self.elapsed_s:,.0f} tok/s"
        )


class Run:
    """One load on one engine."""

    def __init__(self, engine: EngineLoop, load: Load, seed: int) -> None:
        self.engine, self.load = engine, load
        self._random = np.random.default_rng(seed)
        self._vocab_size = min(32_000, engine.source.model_config.vocab_size)
        # By request: when it came, and its last token.
        self._began: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._long: set[int] = set()
        self._num_submitted = self._num_ended = 0
        self._next_long = float("inf")
        self.times = Times()

    def measure(self) -> Times:
        """Run it to its end."""
        load, engine, began = self.load, self.engine, time.perf_counter()
        for _ in range(load.concurrency):
            self._submit_next()
        if load.long_len:
            self._next_long = began + load.every_s
        while self._num_ended < load.num_requests:
            if time.perf_counter() >= self._next_long:
                self._next_long = float("inf")
                self._long.add(self._submit(load.long_len, 1))
            engine.step()
            self._receive()
        self.times.elapsed_s = time.perf_counter() - began
        engine.abort([*self._began.keys() - self._last.keys()])
        while engine.step():
            engine.core.outbox.drain()
        engine.core.check_integrity()
        return self.times

    def _submit(self, length: int, max_tokens: int) -> int:
        tokens = TokenIds(self._random.integers(100, self._vocab_size, length, dtype=np.int32))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        samples = self.engine.prepare(tokens, params, delivery="delta")
        self._began[samples[0].request_id] = time.perf_counter()
        self.engine.submit(samples)
        return samples[0].request_id

    def _submit_next(self) -> None:
        if self._num_submitted < self.load.num_requests:
            self._num_submitted += 1
            self._submit(self.load.input_len, self.load.output_len)

    def _receive(self) -> None:
        now, times, load = time.perf_counter(), self.times, self.load
        for delta in self.engine.core.outbox.drain():
            request_id = delta.request_id
            is_long = request_id in self._long
            times.num_tokens += len(delta.token_ids)
            if request_id not in self._last:
                if is_long or not load.long_len:
                    times.first_s.append(now - self._began[request_id])
            elif not is_long:
                times.gaps_s.append(now - self._last[request_id])
            self._last[request_id] = now
            if is_long:
                self._next_long = now + load.every_s
            elif delta.finish_reason is not None:
                self._num_ended += 1
                assert delta.num_output_tokens == load.output_len
                self._submit_next()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limits", type=float, nargs="+", default=[0.0, 10.0, 20.0])
    parser.add_argument("--loads", nargs="+", default=["long", "512/256x64"])
    parser.add_argument("--streams", type=int, default=8, help="of long: requests that decode")
    parser.add_argument("--input-len", type=int, default=128, help="of long: their prompts")
    parser.add_argument("--output-len", type=int, default=500, help="of long: their answers")
    parser.add_argument("--long-len", type=int, default=8000, help="of long: the prompts beside")
    parser.add_argument("--every", type=float, default=0.2, help="of long: seconds between those")
    parser.add_argument("--waves", type=int, default=4, help="of others: requests in each place")
    parser.add_argument("--repeat", type=int, default=1)
    offline.add_engine_arguments(parser)
    args = parser.parse_args()
    loads = [Load.parse(name, args) for name in args.loads]
    config = offline.engine_config(args)
    engine = EngineLoop(config)
    engine.runner.enter_thread()
    engine.finish_warm_up()
    for index, load in enumerate(loads):
        # Shapes are captured, and kernels compiled, in a run that does not count.
        counted = [limit for _ in range(args.repeat) for limit in args.limits]
        for turn, limit in enumerate([args.limits[-1], *counted]):
            limited = dataclasses.replace(config, max_step_ms=limit)
            engine.core = make_core(limited, engine.runner, engine.tokenizer)
            gc.collect()
            times = Run(engine, load, seed=100 * index + turn).measure()
            note = "" if turn else " (warm-up)"
            print(f"{load.name}, {limit:g} ms{note}: {times.line()}", flush=True)


if __name__ == "__main__":
    main()
