"""Every family whose layers keep a state against transformers: tiny random models of odd sizes.

As ``test_families``. Prefix hits begin from a checkpoint, prompts are cut where one is due, and a
preempted request goes on from one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fidelity import assert_greedy, logits_of, make_prompt
from safetensors.torch import load_file, save_file

CONV = "conv"
DELTA = "linear_attention"
FULL = "full_attention"
LOCAL = "sliding_attention"
# Head norms after the rule amplify float32's noise, transformers' own beyond 1e-4: a little less of it.
DELTA_SIZES = {
    "initializer_range": 0.15,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 20,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_state": 24,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MAMBA2 = {
    "initializer_range": 0.15,
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 24,
    "chunk_size": 16,
}
# A width that is no block of channels, and steps of the size that releases have.
MAMBA1 = {"hidden_size": 72, "intermediate_size": 144, "initializer_range": 0.15}
KIMI = {
    "initializer_range": 0.15,
    "num_key_value_heads": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 24,
    "kv_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
MINIMAX = {"initializer_range": 0.15, "num_local_experts": 5, "block_size": 16}
JAMBA = {
    "initializer_range": 0.15,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 0,
}
GRANITE = {
    **MAMBA,
    "shared_intermediate_size": 56,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
NEMOTRON = {"head_dim": 40, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 24}
NEMOTRON_EXPERTS = {
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "routed_scaling_factor": 1.5,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LFM2": (
        "Lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, FULL, CONV, FULL],
            "block_multiple_of": 24,
            "tie_word_embeddings": True,
        },
    ),
    "LFM2, biases, longer taps": (
        "Lfm2",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": [CONV, CONV, FULL],
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "LFM2-MoE": (
        "Lfm2Moe",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, FULL, CONV, FULL],
            "num_dense_layers": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
    ),
    "LFM2-MoE, without a bias for the choice": (
        "Lfm2Moe",
        {
            "num_hidden_layers": 3,
            "layer_types": [CONV, CONV, FULL],
            "num_dense_layers": 0,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "tie_word_embeddings": False,
        },
    ),
    "LFM3": (
        "Lfm3",
        {
            "num_hidden_layers": 4,
            "layer_types": [CONV, LOCAL, FULL, CONV],
            "head_dim": 40,
            "sliding_window": 24,
            "initializer_range": 0.15,
        },
    ),
    "LFM3, biases, neither gates nor norms, untied": (
        "Lfm3",
        {
            "num_hidden_layers": 3,
            "layer_types": [LOCAL, CONV, FULL],
            "head_dim": 24,
            "num_key_value_heads": 1,
            "sliding_window": 24,
            "conv_L_cache": 4,
            "conv_bias": True,
            "attention_bias": True,
            "use_attention_gate": False,
            "use_sandwich_norm": False,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {
            "head_dim": 40,
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,
            "layer_types": [DELTA, FULL, DELTA, FULL],
            "mlp_only_layers": [1],
            **DELTA_SIZES,
            **EXPERTS,
        },
    ),
    "Qwen3.5": (
        "Qwen3_5Text",
        {
            "head_dim": 96,
            "num_hidden_layers": 4,
            "layer_types": [DELTA, DELTA, FULL, FULL],
            "tie_word_embeddings": True,
            **DELTA_SIZES,
        },
    ),
    "Qwen3.5, a key head for each, biases": (
        "Qwen3_5Text",
        {
            "head_dim": 80,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": [DELTA, FULL, DELTA],
            "attention_bias": True,
            **DELTA_SIZES,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "Qwen3.5-MoE": (
        "Qwen3_5MoeText",
        {
            "head_dim": 40,
            "num_hidden_layers": 4,
            "layer_types": [DELTA, FULL, DELTA, FULL],
            **DELTA_SIZES,
            **EXPERTS,
        },
    ),
    "Mamba-2": ("Mamba2", {"num_hidden_layers": 3, **MAMBA2, "n_groups": 2}),
    "Mamba-2, biases, tied, bounded steps": (
        "Mamba2",
        {
            "num_hidden_layers": 2,
            **MAMBA2,
            "n_groups": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "tie_word_embeddings": True,
            "time_step_limit": [0.3, 1.2],
        },
    ),
    "Mamba": ("Mamba", {"num_hidden_layers": 3, **MAMBA1}),
    "Mamba, biases, untied, another rank": (
        "Mamba",
        {
            "num_hidden_layers": 2,
            **MAMBA1,
            "state_size": 13,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "use_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "FalconMamba": ("FalconMamba", {"num_hidden_layers": 3, **MAMBA1}),
    "Jamba": (
        "Jamba",
        {"num_hidden_layers": 4, **JAMBA, "num_experts": 5, "num_key_value_heads": 1},
    ),
    "Jamba, biases, no experts, tied": (
        "Jamba",
        {
            "num_hidden_layers": 3,
            **JAMBA,
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_proj_bias": True,
            "mamba_d_state": 11,
            "mamba_d_conv": 3,
            "mamba_dt_rank": 5,
            "tie_word_embeddings": True,
        },
    ),
    "MiniMax": ("MiniMax", {"num_hidden_layers": 4, **MINIMAX, "head_dim": 40}),
    "MiniMax, factors, windows, tied": (
        "MiniMax",
        {
            "num_hidden_layers": 3,
            **MINIMAX,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "sliding_window": 24,
            "full_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.7,
            "linear_attn_alpha_factor": 0.8,
            "linear_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.1,
            "mlp_beta_factor": 0.9,
            "tie_word_embeddings": True,
        },
    ),
    "Kimi-Linear": (
        "KimiLinear",
        {"num_hidden_layers": 4, "layer_types": [DELTA, FULL, DELTA, FULL], **KIMI},
    ),
    "Kimi-Linear, a latent of queries, groups of experts": (
        "KimiLinear",
        {
            "num_hidden_layers": 3,
            "layer_types": [FULL, DELTA, DELTA],
            **KIMI,
            "num_key_value_heads": 4,
            "q_lora_rank": 28,
            "linear_conv_kernel_dim": 3,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_local_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
        },
    ),
    "Bamba": (
        "Bamba",
        {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **MAMBA, "mamba_n_groups": 2},
    ),
    "Bamba, biases": (
        "Bamba",
        {
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            **MAMBA,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "Falcon-H1": (
        "FalconH1",
        {
            "num_hidden_layers": 3,
            **MAMBA,
            "mamba_n_groups": 2,
            "mamba_d_ssm": 96,
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
    "Falcon-H1, norm after the gate, biases": (
        "FalconH1",
        {
            "num_hidden_layers": 2,
            **MAMBA,
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_in_multiplier": 1.2,
            "ssm_in_multiplier": 1.3,
            "tie_word_embeddings": True,
        },
    ),
    "Falcon-H1, norm before the gate": (
        "FalconH1",
        {"num_hidden_layers": 2, **MAMBA, "mamba_d_ssm": 64, "mamba_rms_norm": True},
    ),
    "Nemotron-H": (
        "NemotronH",
        {
            "layers_block_type": [DELTA, "mlp", FULL, DELTA, "mlp", FULL],
            **NEMOTRON,
            "n_groups": 2,
        },
    ),
    "Nemotron-H, biases": (
        "NemotronH",
        {
            "layers_block_type": ["mlp", DELTA, FULL],
            "num_key_value_heads": 1,
            "mamba_num_heads": 6,
            "mamba_head_dim": 20,
            "ssm_state_size": 24,
            "n_groups": 1,
            "mlp_bias": True,
            "use_bias": True,
        },
    ),
    "Nemotron 3": (
        "NemotronH",
        {
            "layers_block_type": [DELTA, "moe", FULL, DELTA, "mlp", "moe"],
            **NEMOTRON,
            "n_groups": 2,
            **NEMOTRON_EXPERTS,
        },
    ),
    "Nemotron 3, experts of a latent in groups, biases": (
        "NemotronH",
        {
            "layers_block_type": [DELTA, "moe", FULL, "moe"],
            **NEMOTRON,
            "n_groups": 1,
            **NEMOTRON_EXPERTS,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "moe_latent_size": 48,
            "mlp_bias": True,
            "norm_topk_prob": False,
        },
    ),
    # transformers writes its convolution in three equal parts.
    "OLMo-Hybrid": (
        "OlmoHybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": [DELTA, FULL, DELTA, FULL],
            **DELTA_SIZES,
            "linear_value_head_dim": 12,
        },
    ),
    "OLMo-Hybrid, without rotations": (
        "OlmoHybrid",
        {
            "num_hidden_layers": 2,
            "layer_types": [DELTA, FULL],
            **DELTA_SIZES,
            "linear_value_head_dim": 12,
            "linear_allow_neg_eigval": False,
            "attention_bias": True,
            "rope_parameters": None,
        },
    ),
    "Granite 4": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": [DELTA, FULL, DELTA, FULL],
            "num_local_experts": 0,
            **GRANITE,
            "tie_word_embeddings": True,
        },
    ),
    "Granite 4, experts, rope": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": [DELTA, FULL, DELTA],
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "position_embedding_type": "rope",
            **GRANITE,
        },
    ),
}


def prove_hybrid(driver: Callable[..., Any], path: Any, model: Any, **config: Any) -> None:
    """As ``fidelity.prove_greedy``, with room for few checkpoints."""
    engine = driver(
        path,
        max_num_batched_tokens=32,
        max_num_seqs=5,
        max_model_len=224,
        # For three prompts and answers of some 100 to 160 tokens.
        num_gpu_blocks_override=20,
        num_state_checkpoints=8,
        state_checkpoint_interval=32,
        **config,
    )
    shared = make_prompt(48, seed=1)
    prompts = [shared + make_prompt(43, seed=2), make_prompt(1, seed=3), make_prompt(33, seed=4)]
    outputs = engine.generate(prompts)
    assert any(0 < decodes < reqs for decodes, reqs in engine.batch_sizes)
    prompts.append(shared + make_prompt(20, seed=5))
    outputs += engine.generate(prompts[3:])
    # There are checkpoints at 32 and 64 tokens of the first prompt; the prefixes part after 48.
    assert outputs[3].num_cached_tokens == 32
    # The next turn: an answer's tokens are found with their state, too.
    turn = prompts[3] + outputs[3].token_ids + make_prompt(9, seed=9)
    prompts.append(turn)
    outputs += engine.generate([turn])
    assert outputs[4].num_cached_tokens >= 112
    prompts += [make_prompt(90, seed) for seed in (6, 7, 8)]
    outputs += engine.generate(prompts[5:])
    assert engine.core.stats()["num_preemptions"] > 0
    assert len({token for output in outputs for token in output.token_ids}) > 5
    for prompt_ids, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, prompt_ids, output.token_ids)


# A family's first case is the plainest; the others are in the longer run.
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if "," in name else name for name in CASES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_family_is_what_transformers_computes(
    name: str,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    backend: str,
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **config)
    probe = driver(path, attention_backend=backend)
    token_ids = make_prompt(77)
    torch.testing.assert_close(
        probe.logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    if backend == "reference":  # one request at a time and no more: it is slow
        return
    prove_hybrid(driver, path, model, attention_backend=backend)


def test_the_text_half_of_a_multimodal_file_loads_by_itself(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Qwen3_5Text", **CASES["Qwen3.5"][1])
    tensors = load_file(path / "model.safetensors")
    halves = {
        f"model.language_model.{name.removeprefix('model.')}": t for name, t in tensors.items()
    }
    others = {"model.visual.patch_embed.weight": torch.ones(3), "mtp.norm.weight": torch.ones(3)}
    save_file(halves | others, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    whole = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": {**config, "architectures": None, "model_type": "qwen3_5_text"},
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(whole))
    token_ids = make_prompt(40)
    torch.testing.assert_close(
        driver(path).logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("width", [40, 32, 64])
def test_the_experts_of_a_layer_may_be_one_tensor(
    width: int, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    config = CASES["Qwen3.5-MoE"][1]
    # Of these widths one makes the tensor of gates and ups square, one that of downs.
    path, model = save_tiny("Qwen3_5MoeText", **{**config, "moe_intermediate_size": width})
    model.save_pretrained(path, save_original_format=False)
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (5, 2 * width, 64)
    token_ids = make_prompt(40)
    torch.testing.assert_close(
        driver(path).logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
