"""Meshes that cannot be: one line at start, with the numbers and what would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import resolve_model
from octavo.runner.create import make_runner
from tiny_encoders import save_encoder

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
MAMBA: dict[str, Any] = {
    **LLAMA,
    "architectures": ["BambaForCausalLM"],
    "attn_layer_indices": [1],
    "mamba_n_heads": 6,
    "mamba_n_groups": 1,
    "mamba_expand": 3,
    "mamba_d_state": 8,
}
MIXTURE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
FOUR = {"mesh": "cpu,cpu,cpu,cpu"}
STAGES = {"mesh": "cpu,cpu", "pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (LLAMA, {"mesh": "cpu,cpu,cpu"}, "4 heads and 2 key-value heads .* would: 1, 2, 4$"),
        (LLAMA, {"mesh": "cpu,cpu,cpu", "pipeline_parallel_size": 3}, "2 layers; at most"),
        (MAMBA, FOUR, "2 key-value heads, 6 heads of states in 1 groups .* would: 1, 2$"),
        (MIXTURE, FOUR | {"enable_expert_parallel": True}, "3 experts are fewer than the GPUs"),
        (GPT2, {"mesh": "cpu,cpu"}, "GPT2LMHeadModel runs through transformers' own module"),
        (GPT2, STAGES, "GPT2LMHeadModel runs through transformers' own module"),
    ],
)
def test_a_decoder_that_cannot_be_split_is_refused(
    shape: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shape))
    refused(tmp_path, options | {"load_format": "dummy"}, message)


@pytest.mark.parametrize("options", [{"mesh": "cpu,cpu"}, STAGES])
def test_a_pooling_model_is_not_split(options: dict[str, Any], tmp_path: Path) -> None:
    save_encoder(tmp_path)
    refused(tmp_path, options, "a pooling model cannot be split: tensor_parallel_size")


def refused(folder: Path, options: dict[str, Any], message: str) -> None:
    config = EngineConfig(model=str(folder), device="cpu", threads=1, **options)
    with pytest.raises(ModelLoadError, match=message) as error:
        make_runner(config, resolve_model(config))
    assert "\n" not in str(error.value)
