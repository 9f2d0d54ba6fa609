"""What the offline benchmarks share: an LLM made from the engine's flags, and random prompts."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from octavo.bench.workload import Workload

if TYPE_CHECKING:
    from octavo.llm import LLM

CHECK_PROMPT = "The capital of France is"


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's flags that change what a benchmark measures, named as the server names them."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    group.add_argument("--load-format", choices=("auto", "safetensors", "gguf", "dummy"))
    group.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"))
    group.add_argument("--quantization", "-q")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"))
    group.add_argument("--threads", type=int)
    group.add_argument("--attention-backend", choices=("auto", "native", "reference"))
    group.add_argument("--enforce-eager", action="store_const", const=True)
    group.add_argument("--max-model-len", type=int)
    group.add_argument("--max-num-seqs", type=int)
    group.add_argument("--max-num-batched-tokens", type=int)
    group.add_argument("--gpu-memory-utilization", type=float)
    group.add_argument("--kv-cache-memory-bytes", type=int)
    group.add_argument(
        "--no-enable-prefix-caching",
        dest="enable_prefix_caching",
        action="store_const",
        const=False,
    )


_ENGINE_FLAGS = (
    "load_format",
    "dtype",
    "quantization",
    "device",
    "threads",
    "attention_backend",
    "enforce_eager",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EngineConfig that were set on the command line."""
    given = {name: getattr(args, name) for name in _ENGINE_FLAGS}
    return {name: value for name, value in given.items() if value is not None}


def make_llm(args: argparse.Namespace) -> LLM:
    """The LLM the flags describe.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """
    from octavo.llm import LLM

    return LLM(args.model, **engine_settings(args))


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
