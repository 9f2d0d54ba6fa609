"""Shared parts of the offline benchmarks: an LLM of the engine's flags, and random prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from octavo.bench.workload import Workload
from octavo.config import EngineConfig
from octavo.flags import add_flags, resolve

if TYPE_CHECKING:
    from octavo.llm import LLM

CHECK_PROMPT = "The capital of France is"


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's flags, those of ``octavo serve``; ``--seed`` is also the prompts'."""
    add_flags(parser, EngineConfig)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine the flags describe.

    Raises:
        FlagError: a flag's value cannot be used.
    """
    config: EngineConfig
    [config] = resolve(
        vars(args), [EngineConfig], warn=lambda line: print(f"warning: {line}", file=sys.stderr)
    )
    return config


def settings(config: EngineConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, for a report: without secrets."""
    secrets = {field.name for field in dataclasses.fields(config) if not field.repr}
    return {name: value for name, value in _changes(config).items() if name not in secrets}


def _changes(config: EngineConfig) -> dict[str, Any]:
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }


def make_llm(config: EngineConfig) -> LLM:
    """The engine in this process.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """
    from octavo.llm import LLM

    return LLM(**_changes(config))


def generate(llm: LLM, workload: Workload, output_lens: list[int] | None = None) -> tuple[int, int]:
    """Run the whole workload at once; (prompt tokens, output tokens).

    Raises:
        RuntimeError: an answer is not of the length asked for.
    """
    from octavo.sampling_params import SamplingParams

    indices = range(workload.num_requests)
    wanted = output_lens or [workload.lengths(i)[1] for i in indices]
    outputs = llm.generate(
        [{"prompt_token_ids": workload.prompt_token_ids(i)} for i in indices],
        [
            SamplingParams(
                temperature=workload.temperature, max_tokens=n, ignore_eos=workload.ignore_eos
            )
            for n in wanted
        ],
        use_tqdm=False,
    )
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    if workload.ignore_eos and lengths != wanted:
        raise RuntimeError(f"answers of {lengths} tokens where {wanted} were asked for")
    return sum(len(output.prompt_token_ids) for output in outputs), sum(lengths)


def timed_generate(
    llm: LLM, workload: Workload, seed: int, output_lens: list[int] | None = None
) -> tuple[float, int, int]:
    """(seconds, prompt tokens, output tokens) with prompts of this seed, new to the cache."""
    fresh = dataclasses.replace(workload, seed=seed)
    start_s = time.perf_counter()
    num_prompt, num_output = generate(llm, fresh, output_lens)
    return time.perf_counter() - start_s, num_prompt, num_output


def check(llm: LLM) -> str:
    """A greedy completion to show beside the figures."""
    from octavo.sampling_params import SamplingParams

    [output] = llm.generate(
        CHECK_PROMPT, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False
    )
    return f"{CHECK_PROMPT} -> {output.outputs[0].text!r}"
