"""Quantized files of each layout on the shards of a CPU: one shard's tokens, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import make_prompt
from test_schemes_files import CASES, save

from octavo.errors import ModelLoadError
from octavo.sampling_params import SamplingParams

# A case of each way to store a group, and of its order; the others are in the long list.
QUICK = {
    "awq-gemm",
    "gptq-sym",
    "gptq-desc-act",
    "gptq-ragged-group",
    "ct-actorder",
    "ct-channel",
    "ct-fp8-channel",
    "ct-fp8-block",
    "ct-int8-asym",
    "ct-mxfp4",
}
# By width, and by whole experts.
MIXTURES = ["gptq-moe", "ct-moe", "fp8-moe"]


def tokens(engine: Any) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    prompts = [make_prompt(n, seed=n) for n in (40, 3, 17)]
    return [output.token_ids for output in engine.generate(prompts, greedy)]


def prove(path: Path, driver: Callable[..., Any], **mesh: Any) -> None:
    one, several = driver(path), driver(path, **mesh)
    prompt = make_prompt(40)
    torch.testing.assert_close(several.logits(prompt), one.logits(prompt), atol=1e-3, rtol=0)
    found = tokens(one)
    assert tokens(several) == found
    assert len({token for ids in found for token in ids}) > 5


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.slow])
        for case in CASES
    ],
)
def test_shards_choose_the_tokens_of_one(
    case: Any, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, _ = save(case, save_tiny, tmp_path)
    prove(path, driver, mesh="cpu,cpu")


@pytest.mark.parametrize("name", MIXTURES)
def test_whole_experts_choose_the_tokens_of_one_shard(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    [case] = [case for case in CASES if case.name == name]
    path, _ = save(case, save_tiny, tmp_path)
    prove(path, driver, mesh="cpu,cpu", enable_expert_parallel=True)


@pytest.mark.parametrize("quantization", ["w4", "w8"])
def test_whole_experts_are_rounded_as_one_shards_are(
    quantization: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny(
        "Qwen3Moe",
        num_hidden_layers=2,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    options = {"quantization": quantization, "dtype": "float32"}
    one = driver(path, **options)
    several = driver(path, mesh="cpu,cpu", enable_expert_parallel=True, **options)
    assert tokens(several) == tokens(one)


def test_more_shards_than_experts_are_refused(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Mixtral", num_hidden_layers=1, num_local_experts=3)
    with pytest.raises(ModelLoadError, match="3 experts are fewer than the GPUs") as error:
        driver(path, mesh="cpu,cpu,cpu,cpu", enable_expert_parallel=True)
    assert "\n" not in str(error.value)
