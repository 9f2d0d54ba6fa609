"""``octavo bench latency``: one static batch, in process: time to first token and per step."""

from __future__ import annotations

import argparse
from pathlib import Path

from octavo.bench import offline, report
from octavo.bench.report import Report
from octavo.bench.summary import Figures, percentiles_ms
from octavo.bench.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``octavo bench latency``."""
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens")
    parser.add_argument("--num-iters", type=int, default=5, help="batches per run")
    parser.add_argument("--num-warmups", type=int, default=1, help="batches before")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write one more batch's steps for Perfetto"
    )
    offline.add_engine_arguments(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the process's exit status.

    The time to first token is that of a batch that ends there; a step is what each further token
    of a whole batch adds.
    """
    config = offline.engine_config(args)
    batch, output_len = args.batch_size, args.output_len
    workload = Workload(
        num_requests=batch,
        input_len=args.input_len,
        output_len=output_len,
        vocab_size=args.vocab_size,
        seed=config.seed,
    )
    llm = offline.make_llm(config)
    check = offline.check(llm)
    seed = config.seed + 1
    for _ in range(args.num_warmups):
        offline.timed_generate(llm, workload, seed)
        seed += 1
    runs: list[Figures] = []
    for _ in range(args.repeat):
        first_s: list[float] = []
        e2e_s: list[float] = []
        for _ in range(args.num_iters):
            first_s.append(offline.timed_generate(llm, workload, seed, [1] * batch)[0])
            e2e_s.append(offline.timed_generate(llm, workload, seed + 1)[0])
            seed += 2
        figures = percentiles_ms("ttft", first_s) | percentiles_ms("e2e", e2e_s)
        if output_len > 1:
            steps = [
                (e2e - first) / (output_len - 1) for first, e2e in zip(first_s, e2e_s, strict=True)
            ]
            figures |= percentiles_ms("step", steps)
            figures["output_tokens_per_s"] = batch * 1e3 / figures["step_p50_ms"]
        runs.append(figures)
    details = {}
    if args.trace is not None:
        with llm.trace(args.trace) as trace:
            offline.timed_generate(llm, workload, seed)
        details["trace_us"] = {name: round(us, 1) for name, us in trace.summary_us().items()}
        print("trace, medians in us:", details["trace_us"], flush=True)
    Report(
        title=args.title or f"latency: batch {batch}, {args.input_len}/{output_len}",
        settings=offline.settings(config) | {"batch_size": batch},
        runs=runs,
        check=check,
        details=details,
    ).write(args)
    return 0
