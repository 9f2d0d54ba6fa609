"""Whole models with keys and values of a byte an element, against float32 ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fidelity import make_prompt

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from tiny_encoders import save_tokenizer

CUDA = torch.cuda.is_available()
# Mean error of a token's log probability, in that of a bfloat16 cache: 4 and 5 bits of mantissa less
# are 16 and 32 times as much, integers of 127 for the largest of a row some 5 times.
BOUNDS = {"fp8": 25, "fp8_e5m2": 50, "int8": 10}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")])]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", BOUNDS)
def test_log_probabilities(device: str, asked: str, save_tiny: Callable[..., Any]) -> None:
    """Of a prompt, and of tokens decoded from it: both read what was stored."""
    path, _ = save_tiny("Llama")
    save_tokenizer(path)
    prompts = [make_prompt(length) for length in (3, 40)]
    options: dict[str, Any] = {"device": device, "max_model_len": 128, "dtype": "float32"}

    def logprobs(kv_cache_dtype: str) -> torch.Tensor:
        llm = LLM(str(path), kv_cache_dtype=kv_cache_dtype, num_gpu_blocks_override=32, **options)
        decode = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        found = []
        for prompt in prompts:
            tokens = decoded.setdefault(
                tuple(prompt), [*prompt, *llm.generate([prompt], decode)[0].outputs[0].token_ids]
            )
            steps = llm.generate([tokens], score)[0].prompt_logprobs
            assert steps is not None
            found += [step[t].logprob for step, t in zip(steps[1:], tokens[1:], strict=True)]
        return torch.tensor(found)

    decoded: dict[tuple[int, ...], list[int]] = {}
    exact = logprobs("float32")
    bound = (logprobs("bfloat16") - exact).abs().mean()
    error = (logprobs(asked) - exact).abs().mean()
    assert bound < error < BOUNDS[asked] * bound, (error, bound)


@pytest.mark.parametrize("asked", ["int8", "fp8_per_token_head"])
def test_the_table_of_memory_follows(asked: str, save_tiny: Callable[..., Any]) -> None:
    path, _ = save_tiny("Llama")
    save_tokenizer(path)
    llm = LLM(
        str(path), device="cpu", kv_cache_dtype=asked, max_model_len=64, kv_cache_memory_bytes=1 << 20
    )  # fmt: skip
    rows = dict(llm._engine.runner.memory())
    assert rows["KV cache"].endswith("int8" if asked == "int8" else "float8_e4m3fn")
