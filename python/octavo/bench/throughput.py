"""``octavo bench throughput``: many requests at once, in process: tokens a second."""

from __future__ import annotations

import argparse

from octavo.bench import offline, report
from octavo.bench.report import Report
from octavo.bench.summary import Figures
from octavo.bench.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``octavo bench throughput``."""
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens")
    parser.add_argument("--len-spread", type=float, default=0.0, help="0.8: lengths vary by 80%%")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--num-warmups", type=int, default=4, help="requests before")
    offline.add_engine_arguments(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the process's exit status."""
    config = offline.engine_config(args)
    workload = Workload(
        num_requests=args.num_requests,
        input_len=args.input_len,
        output_len=args.output_len,
        len_spread=args.len_spread,
        temperature=args.temperature,
        vocab_size=args.vocab_size,
        seed=config.seed,
    )
    llm = offline.make_llm(config)
    check = offline.check(llm)
    if args.num_warmups:
        warm = Workload(
            num_requests=args.num_warmups,
            input_len=args.input_len,
            output_len=min(args.output_len, 16),
            vocab_size=args.vocab_size,
        )
        offline.timed_generate(llm, warm, config.seed + args.repeat)
    runs: list[Figures] = []
    for number in range(args.repeat):
        duration_s, num_prompt, num_output = offline.timed_generate(
            llm, workload, config.seed + number
        )
        runs.append(
            {
                "duration_s": duration_s,
                "requests_per_s": args.num_requests / duration_s,
                "output_tokens_per_s": num_output / duration_s,
                "total_tokens_per_s": (num_prompt + num_output) / duration_s,
                "num_prompt_tokens": num_prompt,
                "num_output_tokens": num_output,
            }
        )
    Report(
        title=args.title or f"throughput: {args.num_requests} x {args.input_len}/{args.output_len}",
        settings=offline.settings(config),
        runs=runs,
        check=check,
    ).write(args)
    return 0
