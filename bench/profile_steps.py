"""Device time of a step by kernel: decodes alone, or with prompts mixed in.

    python bench/profile_steps.py --model bench/configs/llama-3.2-1b --load-format dummy \
        --batch-size 64 --context 640 --prefill-tokens 128

Kernels overlap where one is launched before its predecessor ends, so that their durations say
little: a kernel is charged the time from its predecessor's end to its own. The sum is the wall time
of the device. Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
from collections import defaultdict

import torch

from octavo._core import TokenIds
from octavo.bench import offline
from octavo.engine.engine_loop import EngineLoop
from octavo.sampling_params import SamplingParams

PROMPT_LEN = 512  # of the requests that are mixed in


class Feed:
    """Submits random prompts."""

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine
        self.random = random.Random(0)

    def submit(self, num_prompt_tokens: int, max_tokens: int) -> None:
        tokens = [self.random.randrange(100, 32_000) for _ in range(num_prompt_tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.submit(self.engine.prepare(TokenIds(tokens), params))


def short_name(name: str) -> str:
    """A kernel's name without its template arguments, cut to a column's width."""
    name = re.sub(r"<.*", "", name.removeprefix("void "))
    return name if len(name) <= 60 else name[:44] + ".." + name[-14:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=640, help="prompt tokens of each request")
    parser.add_argument(
        "--prefill-tokens", type=int, default=0, help="prompt tokens each profiled step mixes in"
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--top", type=int, default=16, help="rows to print")
    offline.add_engine_arguments(parser)
    args = parser.parse_args()
    if args.prefill_tokens:
        args.max_num_batched_tokens = args.batch_size + args.prefill_tokens
    engine = EngineLoop(offline.engine_config(args))
    engine.runner.enter_thread()
    feed = Feed(engine)

    def steps(num_steps: int) -> None:
        for _ in range(num_steps):
            if args.prefill_tokens and num_waiting() < 2:
                # Always more prompt than a step takes.
                for _ in range(2 + args.prefill_tokens // PROMPT_LEN):
                    feed.submit(PROMPT_LEN, 1)
            engine.step()
            engine.core.outbox.drain()

    def num_waiting() -> float:
        return engine.core.metrics.snapshot()["num_requests_waiting"]

    for _ in range(args.batch_size):
        feed.submit(args.context, engine.limits.max_model_len - args.context - 1)
    for _ in range(args.batch_size * args.context // (args.prefill_tokens or 8192) + 16):
        engine.step()
    steps(32)  # graphs are captured
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        steps(args.steps)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.end, event.time_range.start, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        # Of several shards the lead.
        and event.device_index == torch.cuda.current_device()
    )
    charged: dict[str, list[float]] = defaultdict(list)
    idle_us = 0.0
    for (before, _, _), (end, start, name) in itertools.pairwise(spans):
        charged[short_name(name)].append(end - before)
        idle_us += max(start - before, 0.0)
    total_us = (spans[-1][0] - spans[0][0]) / args.steps
    print(
        f"{args.model}: {args.batch_size} decodes at {args.context} tokens + {args.prefill_tokens}"
        f" prompt tokens: {total_us:,.0f} us a step, {len(spans) / args.steps:.0f} kernels, "
        f"between them {idle_us / args.steps:,.0f} us"
    )
    rows = sorted(charged.items(), key=lambda item: -sum(item[1]))
    for name, times in rows[: args.top]:
        per_step = sum(times) / args.steps
        print(
            f"  {per_step:8,.1f} us {per_step / total_us:5.1%} {len(times) / args.steps:6.1f} x "
            f"{sum(times) / len(times):7.2f} us  {name}"
        )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
