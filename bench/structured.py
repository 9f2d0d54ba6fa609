"""The price of JSON schemas: a constrained load beside the same load without, token for token.

Each request asks for JSON by one of a few schemas, at temperature 1. The free load has the same
prompts and generates, request by request, as many tokens as the constrained one did. Both run in
this process, in turn. Grammars are compiled before the clock starts; their times are printed too.
``cpu_loss_percent`` is the loss in this process's CPU time, which other processes disturb less:
with ``--threads 1``, where none waits for another, it is that of a machine with nothing else to do.
``--in-groups`` takes turns after every ``--concurrency`` requests, and not after the whole load, so
that a clock which drifts within a load drifts for both; ``pairs`` has the quartiles of the loss
over all such turns, which a few that were disturbed do not move.

    python bench/structured.py --concurrency 1 16 --num-requests 32 --repeat 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams

TEXT: dict[str, Any] = {"type": "string", "minLength": 4, "maxLength": 40}
ADDRESS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "street": TEXT,
        "city": TEXT,
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["street", "city", "zip"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "email": {"type": "string", "format": "email", "maxLength": 40},
            "address": {"$ref": "#/$defs/Address"},
        },
        "required": ["name", "age", "email", "address"],
        "additionalProperties": False,
        "$defs": {"Address": ADDRESS},
    },
    "an order": {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "date": {"type": "string", "format": "date"},
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 4,
                "items": {
                    "type": "object",
                    "properties": {
                        "article": TEXT,
                        "count": {"type": "integer", "minimum": 1, "maximum": 99},
                        "price": {"type": "number", "minimum": 0, "maximum": 1000},
                    },
                    "required": ["article", "count", "price"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["id", "date", "items"],
        "additionalProperties": False,
    },
    "a call of a tool": {
        "type": "object",
        "properties": {
            "name": {"enum": ["get_weather", "send_mail", "search"]},
            "arguments": {
                "type": "object",
                "properties": {"query": TEXT, "unit": {"enum": ["celsius", "fahrenheit", None]}},
                "required": ["query", "unit"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
}


def make_requests(llm: LLM, num: int, max_tokens: int) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts and constrained parameters of ``num`` requests, the schemas in turn."""
    prompts: list[Any] = []
    params = []
    for number in range(num):
        topic, schema = list(SCHEMAS.items())[number % len(SCHEMAS)]
        text = f"Request {number}. Invent {topic}, and write it as JSON only."
        prompts.append(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        wanted = StructuredOutputsParams(json=schema)
        params.append(
            SamplingParams(
                temperature=1.0, seed=number, max_tokens=max_tokens, structured_outputs=wanted
            )
        )
    return prompts, params


def timed(
    llm: LLM, prompts: list[Any], params: list[SamplingParams]
) -> tuple[tuple[float, float], list[Any]]:
    """Seconds, seconds of CPU time, and what was generated."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return (time.perf_counter() - began_s, time.process_time() - began_cpu_s), outputs


def measure(args: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    """Seconds of both loads, in turn, and what was generated."""
    llm = LLM(
        args.model,
        load_format=args.load_format,
        max_model_len=args.max_model_len,
        max_num_seqs=concurrency,
        enable_prefix_caching=False,
        threads=args.threads,
    )
    prompts, constrained = make_requests(llm, args.num_requests, args.max_tokens)
    compile_ms = []
    for params in constrained[: len(SCHEMAS)]:
        began_s = time.perf_counter()
        llm._engine.grammars.compile(params)
        compile_ms.append((time.perf_counter() - began_s) * 1e3)
    # Twice: graphs are captured at their second use.
    timed(llm, prompts, constrained)
    _, outputs = timed(llm, prompts, constrained)
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    for output in outputs:
        if output.outputs[0].finish_reason == "stop":
            json.loads(output.outputs[0].text)
    free = [
        SamplingParams(temperature=1.0, seed=n, max_tokens=count, ignore_eos=True)
        for n, count in enumerate(counts)
    ]
    seconds: dict[str, list[float]] = {"free": [], "constrained": []}
    cpu_s: dict[str, list[float]] = {"free": [], "constrained": []}
    size = concurrency if args.in_groups else len(prompts)
    groups = [slice(at, at + size) for at in range(0, len(prompts), size)]
    pairs: list[tuple[float, float]] = []
    for _ in range(args.repeat):
        for name in seconds:
            seconds[name].append(0.0)
            cpu_s[name].append(0.0)
        for number, group in enumerate(groups):
            # Who is first is served by a cache that the other has left: each is, in turn.
            turns = [("free", free), ("constrained", constrained)][:: 1 - 2 * (number % 2)]
            taken: dict[str, tuple[float, float]] = {}
            for name, params_of in turns:
                taken[name], outputs = timed(llm, prompts[group], params_of[group])
                seconds[name][-1] += taken[name][0]
                cpu_s[name][-1] += taken[name][1]
                found = [len(output.outputs[0].token_ids) for output in outputs]
                assert found == counts[group]
            by_clock, by_cpu = zip(taken["free"], taken["constrained"], strict=True)
            pairs.append((1 - by_clock[0] / by_clock[1], 1 - by_cpu[0] / by_cpu[1]))
    rates = {name: sum(counts) / statistics.median(found) for name, found in seconds.items()}
    ratios = [f / c for f, c in zip(seconds["free"], seconds["constrained"], strict=True)]
    cpu_ratios = [f / c for f, c in zip(cpu_s["free"], cpu_s["constrained"], strict=True)]
    figures = {
        "concurrency": concurrency,
        "tokens": sum(counts),
        "whole": sum(output.outputs[0].finish_reason == "stop" for output in outputs),
        "compile_ms": [round(ms, 1) for ms in compile_ms],
        "free_tokens_per_s": round(rates["free"], 1),
        "constrained_tokens_per_s": round(rates["constrained"], 1),
        "loss_percent": round(100 * (1 - statistics.median(ratios)), 2),
        "loss_percent_each": [round(100 * (1 - ratio), 2) for ratio in ratios],
        "cpu_loss_percent": round(100 * (1 - statistics.median(cpu_ratios)), 2),
        "cpu_loss_percent_each": [round(100 * (1 - ratio), 2) for ratio in cpu_ratios],
    }
    if args.in_groups:
        figures["pairs"] = {
            "number": len(pairs),
            "loss_percent": _quartiles([by_clock for by_clock, _ in pairs]),
            "cpu_loss_percent": _quartiles([by_cpu for _, by_cpu in pairs]),
        }
    return figures


def _quartiles(losses: list[float]) -> list[float]:
    return [round(100 * loss, 2) for loss in statistics.quantiles(losses, method="inclusive")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--in-groups", action="store_true")
    args = parser.parse_args()
    for concurrency in args.concurrency:
        print(json.dumps(measure(args, concurrency)))


if __name__ == "__main__":
    main()
