"""Once ready, a GPU's memory is enough for whatever comes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAX_MODEL_LEN = 8192
CONFIG = Path(__file__).parents[2] / "bench" / "configs" / "llama-3.2-1b"


def serve_256_requests() -> None:
    """Random lengths up to the longest; every eighth wants log probabilities of its prompt."""
    from octavo import LLM, SamplingParams

    llm = LLM(str(CONFIG), load_format="dummy", max_model_len=MAX_MODEL_LEN, max_num_seqs=256)
    generator = random.Random(0)
    prompts, params = [], []
    for i in range(256):
        length = MAX_MODEL_LEN - 1 if i % 64 == 0 else generator.randrange(1, MAX_MODEL_LEN)
        prompts.append(
            {"prompt_token_ids": [generator.randrange(100, 30_000) for _ in range(length)]}
        )
        params.append(
            SamplingParams(
                max_tokens=min(generator.randrange(1, 200), MAX_MODEL_LEN - length),
                temperature=generator.choice([0.0, 1.0]),
                top_p=generator.choice([1.0, 0.9]),
                logprobs=generator.choice([None, 5]),
                repetition_penalty=generator.choice([1.0, 1.1]),
                prompt_logprobs=5 if i % 8 == 0 else None,
                ignore_eos=True,
            )
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, wanted, output in zip(prompts, params, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == wanted.max_tokens
        assert output.outputs[0].finish_reason == "length"
        if wanted.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(prompt["prompt_token_ids"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_256_requests_of_any_length() -> None:
    # A process of its own: the memory that other tests hold is no part of this.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


if __name__ == "__main__":
    serve_256_requests()
