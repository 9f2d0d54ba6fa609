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
# Heads that are equal parts of the hidden size.
PARTS: tuple[dict[str, Any], ...] = tuple(
    {"hidden_size": heads * dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    for heads, dim, kv_heads in ((2, 40, 1), (3, 80, 3), (2, 96, 2))
)
LAYERS_OF_4 = {"num_hidden_layers": 4, "sliding_window": 24}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def of_all_sizes(
    name: str,
    family: str,
    *variants: dict[str, Any],
    shapes: tuple[dict[str, Any], ...] = SHAPES,
) -> dict[str, Case]:
    """A case for each of three shapes of heads, with the switches of a variant each."""
    return {
        f"{name}, heads of {dim}": (family, {**shape, **variant})
        for dim, shape, variant in zip((40, 80, 96), shapes, variants, strict=True)
    }


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **parameters}}


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
HALF = rope(partial_rotary_factor=0.5)
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
}
GROUPED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "n_group": 3,
    "topk_group": 2,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
}
ERNIE = {
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 2,
    "num_hidden_layers": 4,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
# Multi-head attention alone: head sizes, and one and three heads.
OLD: tuple[dict[str, Any], ...] = tuple(
    {"hidden_size": heads * dim, "num_attention_heads": heads}
    for heads, dim in ((3, 40), (1, 80), (6, 96))
)
# The latent and its rotated key are a head of the cache together.
LATENTS: tuple[dict[str, Any], ...] = tuple(
    {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": 24,
        "v_head_dim": 20,
        "q_lora_rank": q_rank,
        "num_key_value_heads": 4,
    }
    for rank, rope_dim, q_rank in ((32, 8, None), (64, 16, 40), (80, 16, 48))
)
LATENT_YARN = rope(**YARN, mscale=0.7, mscale_all_dim=1.0)
ATTENTION_CASES: dict[str, Case] = {
    **of_all_sizes("Bloom", "Bloom", TIED, UNTIED, {}, shapes=OLD),
    **of_all_sizes(
        "MPT", "Mpt", TIED, UNTIED, {"attn_config": {"softmax_scale": 0.08}}, shapes=OLD
    ),
    **of_all_sizes(
        "GPT-Neo",
        "GPTNeo",
        {"attention_types": [[["global"], 2]], **TIED},
        {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]], **UNTIED},
        {"attention_types": [[["local"], 2]]},
        # Its scores are not divided by the head's size: large ones would amplify noise.
        shapes=tuple(
            {**shape, "window_size": 24, "initializer_range": 0.8 / shape["hidden_size"] ** 0.5}
            for shape in OLD
        ),
    ),
    **of_all_sizes(
        "DeepSeek V3",
        "DeepseekV3",
        {**GROUPED, **UNTIED, **LATENT_YARN},
        {**GROUPED, **BIAS, **TIED, "rope_interleave": False},
        {**GROUPED, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        shapes=LATENTS,
    ),
    **of_all_sizes(
        "DeepSeek V2",
        "DeepseekV2",
        {**GROUPED, **UNTIED, "topk_method": "group_limited_greedy"},
        {**GROUPED, **BIAS, **TIED, **LATENT_YARN, "mlp_bias": True},
        {**GROUPED, "n_group": None, "topk_group": None, "first_k_dense_replace": 0},
        shapes=LATENTS,
    ),
    **of_all_sizes(
        "GLM-4.7-Flash",
        "Glm4MoeLite",
        {**GROUPED, **UNTIED, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2},
        {**GROUPED, **BIAS, **TIED, "num_hidden_layers": 2},
        {**GROUPED, "num_hidden_layers": 3},
        shapes=LATENTS,
    ),
    **of_all_sizes(
        "gpt-oss",
        "GptOss",
        {**EXPERTS, **LAYERS_OF_4, **BIAS, **UNTIED},
        # Not quite so large logits: in sums that are made one by one theirs err by 1.2e-4.
        {
            **EXPERTS,
            **LAYERS_OF_4,
            **NO_BIAS,
            **TIED,
            "num_experts_per_tok": 4,
            "initializer_range": 0.09,
        },
        {**EXPERTS, **LAYERS_OF_4, **BIAS, "max_position_embeddings": 131072},
    ),
    **of_all_sizes(
        "OLMo 3",
        "Olmo3",
        {
            **LAYERS_OF_4,
            "layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL],
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1000.0},
                GLOBAL: {**YARN, "rope_theta": 50000.0},
            },
        },
        {
            **LAYERS_OF_4,
            "num_hidden_layers": 5,
            "layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL, LOCAL],
            **BIAS,
        },
        {**LAYERS_OF_4, "layer_types": [LOCAL, GLOBAL] * 2, **NO_BIAS, **TIED},
        shapes=PARTS,
    ),
    **of_all_sizes(
        "Ministral 3",
        "Ministral3",
        rope(**YARN, llama_4_scaling_beta=0.1),
        {**rope(**YARN, llama_4_scaling_beta=0.3), "sliding_window": 24, **TIED},
        rope(**YARN, llama_4_scaling_beta=0.1),
    ),
    **of_all_sizes(
        "Cohere 2",
        "Cohere2",
        {**LAYERS_OF_4, "num_hidden_layers": 8, **TIED},
        {**LAYERS_OF_4, "layer_types": [LOCAL, LOCAL, GLOBAL, GLOBAL], **BIAS, **UNTIED},
        {**LAYERS_OF_4, "layer_types": [LOCAL, GLOBAL] * 2, "logit_scale": 0.5},
        shapes=PARTS,
    ),
    **of_all_sizes("GLM-4-9B", "Glm", {**HALF, **UNTIED}, {**HALF, **NO_BIAS, **TIED}, HALF),
    **of_all_sizes("GLM-4", "Glm4", {**HALF, **UNTIED}, {**HALF, **NO_BIAS, **TIED}, HALF),
    **of_all_sizes(
        "GLM-4.5",
        "Glm4Moe",
        {**GROUPED, **HALF, **UNTIED},
        {**GROUPED, **HALF, **BIAS, **TIED, "use_qk_norm": True},
        {**GROUPED, **HALF, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    **of_all_sizes(
        "MiniMax-M2",
        "MiniMaxM2",
        {**EXPERTS, **HALF, **UNTIED},
        {**EXPERTS, **HALF, **TIED},
        {**EXPERTS, "rotary_dim": 32},
    ),
    **of_all_sizes(
        "Ernie 4.5",
        "Ernie4_5",
        TIED,
        {"use_bias": True, **UNTIED},
        {"use_bias": True},
        shapes=SHAPES,
    ),
    **of_all_sizes(
        "Ernie 4.5 MoE", "Ernie4_5_Moe", ERNIE, {**ERNIE, **UNTIED}, ERNIE, shapes=PARTS
    ),
    **of_all_sizes("Hunyuan", "HunYuanDenseV1", {}, {**BIAS, **TIED}, UNTIED),
    **of_all_sizes(
        "Hunyuan MoE",
        "HunYuanMoEV1",
        {"num_experts": 5, "moe_topk": 2},
        {"num_experts": 4, "moe_topk": 1, **BIAS, **TIED},
        {"num_experts": 5, "moe_topk": [3] * 2},
    ),
    **of_all_sizes(
        "Qwen2-MoE",
        "Qwen2Moe",
        {**QWEN_EXPERTS, "norm_topk_prob": True, **UNTIED},
        {
            **QWEN_EXPERTS,
            **TIED,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0, 2],
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 4,
        },
        {**QWEN_EXPERTS, "qkv_bias": False},
        shapes=PARTS,
    ),
    **of_all_sizes(
        "OLMoE",
        "Olmoe",
        {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"num_experts": 5, "num_experts_per_tok": 2, **BIAS, **TIED},
        {"num_experts": 3, "num_experts_per_tok": 1},
        shapes=PARTS,
    ),
    **of_all_sizes(
        "Granite MoE",
        "GraniteMoe",
        {**EXPERTS, **GRANITE, **UNTIED},
        {**EXPERTS, **GRANITE, **BIAS, **TIED},
        {**EXPERTS, **GRANITE},
        shapes=PARTS,
    ),
}
