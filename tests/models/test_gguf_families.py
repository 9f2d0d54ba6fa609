"""Every GGUF architecture against transformers: tiny random models, written as llama.cpp does."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma_configs import GEMMA_3N_READERS, GEMMA_4_EXPERTS, GEMMA_4_READERS
from gguf_files import write_gguf

from octavo.errors import ModelLoadError
from octavo.models.gguf_config import GGUF_ARCHITECTURES
from octavo.models.gguf_hf_config import GGUF_HF_CONFIGS
from octavo.models.split import check_split


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


GRANITE_4 = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "shared_intermediate_size": 56,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
FULL, DELTA = "full_attention", "linear_attention"
DELTA_SIZES = {
    # Head norms after the rule amplify float32's noise.
    "initializer_range": 0.15,
    "num_hidden_layers": 4,
    "layer_types": [DELTA, DELTA, DELTA, FULL],
    "head_dim": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 20,
}
SHARED_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
}
LOCAL = "sliding_attention"
MAMBA_1 = {"intermediate_size": 128, "initializer_range": 0.15}
MIMO_ROPE = {"rope_type": "default", "partial_rotary_factor": 0.5}
# Of files: every token has vectors of each layer, and the head is the embedding.
GEMMA_FILE = {"vocab_size_per_layer_input": 300, "tie_word_embeddings": True}
NEMOTRON = {"head_dim": 40, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 24}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("llama", "Llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "Mistral, window": ("llama", "Mistral", {"head_dim": 16, "sliding_window": 24}),
    "Mixtral": (
        "llama",
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Ministral 3": (
        "mistral3",
        "Ministral3",
        {
            "head_dim": 16,
            **rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.3,
            ),
        },
    ),
    "SmolLM3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5, "use_sliding_window": False}),
    "OLMo 3": (
        "olmo2",
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        },
    ),
    "Qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", "Qwen3", {"head_dim": 80}),
    "Llama, biases, rope llama3": (
        "llama",
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 1,
            **rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "Llama, rope linear": ("llama", "Llama", rope(rope_type="linear", factor=3.0)),
    "Qwen2, rope yarn": (
        "qwen2",
        "Qwen2",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "Phi-3": ("phi3", "Phi3", {"sliding_window": 24}),
    "Phi-3.5, longrope": (
        "phi3",
        "Phi3",
        {
            "max_position_embeddings": 400,
            "original_max_position_embeddings": 200,
            **rope(
                rope_type="longrope",
                short_factor=[1.0 + 0.02 * i for i in range(8)],
                long_factor=[1.0 + 0.3 * i for i in range(8)],
            ),
        },
    ),
    "Gemma": ("gemma", "Gemma", {"head_dim": 40, "tie_word_embeddings": True}),
    "Gemma 2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 40,
            "query_pre_attn_scalar": 40,
            "sliding_window": 24,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3": (
        "gemma3",
        "Gemma3Text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
            "head_dim": 40,
            "query_pre_attn_scalar": 40,
            "sliding_window": 24,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss": (
        "gpt-oss",
        "GptOss",
        {
            "head_dim": 40,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "Qwen2-MoE": (
        "qwen2moe",
        "Qwen2Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "Qwen3-MoE": (
        "qwen3moe",
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "OLMo 2": ("olmo2", "Olmo2", {}),
    "OLMoE": ("olmoe", "Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "Cohere 2": (
        "cohere2",
        "Cohere2",
        {"num_hidden_layers": 8, "sliding_window": 24, "tie_word_embeddings": True},
    ),
    "Ernie 4.5": ("ernie4_5", "Ernie4_5", {"tie_word_embeddings": True}),
    "Ernie 4.5 MoE": (
        "ernie4_5-moe",
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_intermediate_size": 40,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "GLM-4": ("glm4", "Glm4", rope(partial_rotary_factor=0.5, rope_type="default")),
    "GLM-4.5": (
        "glm4moe",
        "Glm4Moe",
        {
            **rope(partial_rotary_factor=0.5, rope_type="default"),
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
        },
    ),
    "MiniMax-M2": (
        "minimax-m2",
        "MiniMaxM2",
        {
            **rope(partial_rotary_factor=0.5, rope_type="default"),
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "Granite": ("granite", "Granite", {"attention_multiplier": 0.1, "logits_scaling": 2.0}),
    "Granite MoE": (
        "granitemoe",
        "GraniteMoe",
        {
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "LFM2": (
        "lfm2",
        "Lfm2",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,
        },
    ),
    "LFM2-MoE": (
        "lfm2moe",
        "Lfm2Moe",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
    ),
    "Granite 4": ("granitehybrid", "GraniteMoeHybrid", {**GRANITE_4, "num_local_experts": 0}),
    "Granite 4, experts": (
        "granitehybrid",
        "GraniteMoeHybrid",
        {
            **GRANITE_4,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "position_embedding_type": "rope",
        },
    ),
    "Falcon-H1": (
        "falcon-h1",
        "FalconH1",
        {
            "mamba_n_heads": 4,
            "mamba_d_state": 24,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 16,
            "mamba_d_ssm": 96,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 1.5,
            "mlp_multipliers": [0.7, 0.8],
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.8,
            "ssm_multipliers": [0.9, 0.7, 1.2, 0.8, 1.1],
        },
    ),
    "Mamba-2": (
        "mamba2",
        "Mamba2",
        {
            "initializer_range": 0.15,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 24,
            "chunk_size": 16,
            "n_groups": 2,
            "use_bias": True,
        },
    ),
    "Nemotron-H": (
        "nemotron_h",
        "NemotronH",
        {"layers_block_type": [DELTA, "mlp", FULL, DELTA], **NEMOTRON, "n_groups": 2},
    ),
    "Nemotron 3": (
        "nemotron_h_moe",
        "NemotronH",
        {
            "layers_block_type": [DELTA, "moe", FULL, "moe"],
            **NEMOTRON,
            "n_groups": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "moe_shared_expert_intermediate_size": 56,
            "routed_scaling_factor": 1.5,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "DeepSeek V3": ("deepseek2", "DeepseekV3", LATENT),
    "DeepSeek V3, rope yarn": (
        "deepseek2",
        "DeepseekV3",
        {
            **LATENT,
            **rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=0.7,
                mscale_all_dim=0.7,
            ),
        },
    ),
    "DeepSeek V2, keys and values as one": (
        "deepseek2",
        "DeepseekV2",
        {**LATENT, "topk_method": "group_limited_greedy"},
    ),
    "DeepSeek V2 Lite": (
        "deepseek2",
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "Qwen3-Next": ("qwen3next", "Qwen3Next", {**DELTA_SIZES, **SHARED_EXPERTS}),
    "Qwen3-Next, inputs as one": ("qwen3next", "Qwen3Next", {**DELTA_SIZES, **SHARED_EXPERTS}),
    "Qwen3.5": ("qwen35", "Qwen3_5Text", DELTA_SIZES),
    "Qwen3.5, a key head for each": (
        "qwen35",
        "Qwen3_5Text",
        {**DELTA_SIZES, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
    ),
    "Qwen3.5-MoE": ("qwen35moe", "Qwen3_5MoeText", {**DELTA_SIZES, **SHARED_EXPERTS}),
    "Bloom": ("bloom", "Bloom", {"tie_word_embeddings": False}),
    "MPT": ("mpt", "Mpt", {"tie_word_embeddings": True}),
    "Falcon 7B": ("falcon", "Falcon", {"hidden_size": 160}),
    "Falcon 40B": (
        "falcon",
        "Falcon",
        {
            "hidden_size": 240,
            "num_attention_heads": 6,
            "new_decoder_architecture": True,
            "num_kv_heads": 3,
            "tie_word_embeddings": False,
        },
    ),
    "Falcon 11B": (
        "falcon",
        "Falcon",
        {
            "hidden_size": 320,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 2,
            "ffn_hidden_size": 100,
        },
    ),
    "Phi-2": (
        "phi2",
        "Phi",
        {
            "hidden_size": 160,
            "num_key_value_heads": 4,
            **rope(rope_type="default", partial_rotary_factor=0.4),
        },
    ),
    "StableLM": ("stablelm", "StableLm", {"num_key_value_heads": 4, "use_qkv_bias": True}),
    "StableLM 2 12B": (
        "stablelm",
        "StableLm",
        {
            "qk_layernorm": True,
            "use_parallel_residual": True,
            **rope(rope_type="default", partial_rotary_factor=0.5),
        },
    ),
    "GLM-4-9B": (
        "chatglm",
        "Glm",
        {"head_dim": 16, **rope(partial_rotary_factor=0.5, rope_type="default")},
    ),
    "Mamba": ("mamba", "Mamba", MAMBA_1),
    "FalconMamba": ("mamba", "FalconMamba", MAMBA_1),
    "Jamba": (
        "jamba",
        "Jamba",
        {
            "initializer_range": 0.15,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "num_experts": 5,
        },
    ),
    "Kimi-Linear": (
        "kimi-linear",
        "KimiLinear",
        {
            "initializer_range": 0.15,
            "num_hidden_layers": 4,
            "layer_types": [DELTA, FULL, DELTA, FULL],
            "num_key_value_heads": 4,
            "linear_num_heads": 4,
            "linear_head_dim": 24,
            "kv_lora_rank": 40,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
    ),
    "MiMo-V2-Flash": (
        "mimo2",
        "MiMoV2Flash",
        {
            "num_hidden_layers": 4,
            "layer_types": [FULL, LOCAL] * 2,
            "sliding_window": 24,
            "head_dim": 40,
            "v_head_dim": 24,
            "moe_intermediate_size": 40,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                FULL: {**MIMO_ROPE, "rope_theta": 50000.0},
                LOCAL: {**MIMO_ROPE, "rope_theta": 1000.0},
            },
        },
    ),
    "Llama 4": (
        "llama4",
        "Llama4Text",
        {
            "num_hidden_layers": 4,
            "head_dim": 40,
            "intermediate_size_mlp": 112,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
        },
    ),
    "Gemma 3n": (
        "gemma3n",
        "Gemma3nText",
        {**GEMMA_3N_READERS, **GEMMA_FILE},
    ),
    "Gemma 4": (
        "gemma4",
        "Gemma4Text",
        {**GEMMA_4_READERS, **GEMMA_FILE},
    ),
    "Gemma 4, values that are keys, experts": (
        "gemma4",
        "Gemma4Text",
        {**GEMMA_4_EXPERTS, **GEMMA_FILE, "head_dim": 40, "global_head_dim": 80},
    ),
    "Hunyuan": ("hunyuan-dense", "HunYuanDenseV1", {"head_dim": 40}),
    "Hunyuan MoE": (
        "hunyuan-moe",
        "HunYuanMoEV1",
        {"head_dim": 40, "num_experts": 5, "moe_topk": 2},
    ),
}


def test_every_architecture_is_proven() -> None:
    assert {arch for arch, _, _ in CASES.values()} == {*GGUF_ARCHITECTURES, *GGUF_HF_CONFIGS}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_is_what_transformers_computes(
    case: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    arch, family, config = CASES[case]
    path, model = save_tiny(family, **config)
    file = tmp_path / "model.gguf"
    write_gguf(file, arch, model, case)
    token_ids = random.Random(0).choices(range(3, 300), k=77)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    found = driver(file).logits(token_ids)
    # Gemma's logits reach 16 here: transformers' own float32 is 2e-4 from its float64.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    # The same weights from safetensors are the same model to the last bits.
    # A factor or a 1 that is folded into weights rounds them anew, which head norms amplify.
    atol = 1e-4 if arch in ("falcon-h1", "qwen35moe") else 1e-5
    torch.testing.assert_close(found, driver(path).logits(token_ids), atol=atol, rtol=1e-5)


# Whose rows, or columns, a file has in an order of its own; the others are in the long list.
QUICK = {"Bloom", "Falcon 40B", "Qwen3.5", "Gemma 4, values that are keys, experts"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in CASES
        # Of three heads of states and four of attention.
        if case != "Qwen3.5, a key head for each"
    ],
)
def test_shards_of_a_gguf_file_compute_what_one_does(
    case: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    arch, family, config = CASES[case]
    _path, model = save_tiny(family, **config)
    file = tmp_path / "model.gguf"
    write_gguf(file, arch, model, case)
    token_ids = random.Random(0).choices(range(3, 300), k=40)
    whole = driver(file)
    expected = whole.logits(token_ids)
    sizes = []
    for size in (2, 3):
        with contextlib.suppress(ModelLoadError):
            check_split(whole.source.model_config, size)
            sizes.append(size)
    assert sizes
    for size in sizes:
        found = driver(file, mesh=",".join(["cpu"] * size)).logits(token_ids)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
