"""Models whose layers keep a state in GraphRunner: the plain runner's tokens, hits and all.

Interpreted without a GPU, where nothing is captured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from two_runners import PROMPTS, SHARED, both_runners

COMMON: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "short convolutions": {
        "architectures": ["Lfm2ForCausalLM"],
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "gated delta rule": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
    },
    "state space": {
        "architectures": ["Mamba2ForCausalLM"],
        "num_hidden_layers": 1,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
    },
}


def run(llm: LLM) -> tuple[list[list[list[int]]], list[int]]:
    """Each prompt's tokens, those of a second round, and what that found in the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    rounds = []
    for prompts in (PROMPTS, [[*SHARED, 8], PROMPTS[0]]):
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        rounds.append(llm.generate(asked, params, use_tqdm=False))
    tokens = [[list(output.outputs[0].token_ids) for output in outputs] for outputs in rounds]
    return tokens, [output.num_cached_tokens or 0 for output in rounds[1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
@pytest.mark.parametrize(
    "name",
    [
        name if i == 0 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(MODELS)
    ],
)
def test_interpreted_steps_choose_the_plain_runners_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | MODELS[name]))
    plain, interpreted = (run(llm) for llm in both_runners(tmp_path, monkeypatch))
    assert interpreted == plain
    # Chunks of the first prompt ended at 8 and 16 tokens of the shared ones.
    assert plain[1] == [16, 16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("stages", [1, 2])
def test_interpreted_shards_and_stages_copy_their_own_states(
    stages: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of short convolutions the second stage keeps no state at all."""
    shape = COMMON | MODELS[name]
    shape["num_hidden_layers"] = max(shape["num_hidden_layers"], stages)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    options = {"mesh": "cpu,cpu", "pipeline_parallel_size": stages}
    plain, interpreted = (run(llm) for llm in both_runners(tmp_path, monkeypatch, **options))
    assert interpreted == plain
    assert plain[1] == [16, 16]
