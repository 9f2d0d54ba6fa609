"""Rotary frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.layers.rope import RopeConfig, cos_sin_table, rope_frequencies
from octavo.models.config import ModelConfig
from octavo.models.registry import config_from_hf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = {
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
    "original_max_position_embeddings": 4096,
}

# name -> (head_dim, rope_scaling)
CASES: dict[str, tuple[int, dict[str, Any] | None]] = {
    "default": (64, None),
    "odd head": (40, None),
    "linear": (64, {"rope_type": "linear", "factor": 2.5}),
    "linear, old spelling": (64, {"type": "linear", "factor": 2.0}),
    "dynamic": (64, {"rope_type": "dynamic", "factor": 4.0}),
    "llama3": (128, LLAMA3),
    "llama3, short": (64, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 1024}),
    "yarn": (64, YARN),
    "yarn, attention_factor": (64, {**YARN, "attention_factor": 0.7}),
    "yarn, mscale": (64, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}),
    "yarn, betas": (128, {**YARN, "beta_fast": 24, "beta_slow": 2, "truncate": False}),
    "proportional": (64, {"rope_type": "proportional", "partial_rotary_factor": 0.3}),
    "proportional, factor": (40, {"rope_type": "proportional", "factor": 2.0}),
    "longrope": (64, {**LONGROPE, "rope_type": "longrope"}),
    "longrope, attention_factor": (64, {**LONGROPE, "type": "longrope", "attention_factor": 1.1}),
    "longrope, factor": (64, {**LONGROPE, "type": "longrope", "factor": 8.0}),
}


def both(head_dim: int, scaling: dict[str, Any] | None) -> tuple[ModelConfig, Any]:
    """The same config.json read by octavo and by transformers."""
    from transformers import LlamaConfig

    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16384,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
    }
    if scaling is not None:
        raw["rope_scaling"] = scaling
    theirs = LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    return config_from_hf(raw), theirs


def their_frequencies(config: Any, seq_len: int) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seq_len)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seq_len", [512, 16384, 40000])
def test_frequencies_are_those_of_transformers(name: str, seq_len: int) -> None:
    ours, theirs = both(*CASES[name])
    inv_freq, factor = rope_frequencies(ours.rope, ours.max_position_embeddings, seq_len)
    expected, expected_factor = their_frequencies(theirs, seq_len)
    torch.testing.assert_close(inv_freq, expected, rtol=2e-7, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_the_table_is_what_transformers_multiplies_with(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours, theirs = both(*CASES[name])
    table = cos_sin_table(ours.rope, ours.max_position_embeddings, 3000, torch.device("cpu"))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(3000)[None])
    half = ours.head_dim // 2
    # An angle's last bit at position 3000 is 2e-4 radians.
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], atol=3e-4, rtol=0)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], atol=3e-4, rtol=0)


def test_factors_of_a_gguf_file_are_llama3_scaling() -> None:
    config, _ = both(*CASES["llama3"])
    wanted, _ = rope_frequencies(config.rope, 16384)
    plain = RopeConfig(theta=50000.0, rot_dim=128)
    factors = tuple((rope_frequencies(plain, 16384)[0] / wanted).tolist())
    got, _ = rope_frequencies(RopeConfig(theta=50000.0, rot_dim=128, freq_factors=factors), 16384)
    torch.testing.assert_close(got, wanted)


def test_an_unknown_kind_and_a_missing_parameter_are_named() -> None:
    with pytest.raises(ValueError, match="'longer' is not supported"):
        rope_frequencies(RopeConfig(theta=1e4, rot_dim=8, rope_type="longer"), 16)
    with pytest.raises(ValueError, match="'linear' needs 'factor'"):
        rope_frequencies(RopeConfig(theta=1e4, rot_dim=8, rope_type="linear"), 16)
