"""Cases of the families that came later: as test_families' own, of three sizes each."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any]]

TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
BIAS: dict[str, Any] = {"attention_bias": True}
NO_BIAS: dict[str, Any] = {"attention_bias": False}
SHAPES: tuple[dict[str, Any], ...] = (
    {"head_dim": 40, "num_key_value_heads": 1},
    {"head_dim": 80, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    {"head_dim": 96, "num_key_value_heads": 2},
)
LAYERS_OF_4 = {"num_hidden_layers": 4, "sliding_window": 24}


def of_all_sizes(name: str, family: str, *variants: dict[str, Any]) -> dict[str, Case]:
    """A case for each of three shapes of heads, with the switches of a variant each."""
    assert len(variants) == len(SHAPES)
    return {
        f"{name}, heads of {shape['head_dim']}": (family, {**shape, **variant})
        for shape, variant in zip(SHAPES, variants, strict=True)
    }


EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
ATTENTION_CASES: dict[str, Case] = {
    **of_all_sizes(
        "gpt-oss",
        "GptOss",
        {**EXPERTS, **LAYERS_OF_4, **BIAS, **UNTIED},
        {**EXPERTS, **LAYERS_OF_4, **NO_BIAS, **TIED, "num_experts_per_tok": 4},
        {**EXPERTS, **LAYERS_OF_4, **BIAS, "max_position_embeddings": 131072},
    ),
}
