"""Every GGUF architecture against transformers: tiny random models, written as llama.cpp does.

Names come from the ``gguf`` package, not from the loader.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from octavo.models.gguf_config import GGUF_ARCHITECTURES


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
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("llama", "Llama", {"head_dim": 40, "num_key_value_heads": 1}),
    "Mistral, window": ("llama", "Mistral", {"head_dim": 16, "sliding_window": 24}),
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
    "Hunyuan": ("hunyuan-dense", "HunYuanDenseV1", {"head_dim": 40}),
    "Hunyuan MoE": (
        "hunyuan-moe",
        "HunYuanMoEV1",
        {"head_dim": 40, "num_experts": 5, "moe_topk": 2},
    ),
}


def unfused(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors; of experts the gate's and up's apart, as llama.cpp writes them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        # gpt-oss stores its own as [E, K, N], the halves of a row interleaved.
        is_oss = hasattr(model.config, "swiglu_limit")
        if name.endswith("shared_mlp.input_linear.weight"):
            # Without experts the MLP is a plain one.
            to = "mlp.shared_expert" if model.config.num_local_experts else "mlp"
            for half, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                tensors[name.replace("shared_mlp.input_linear", f"{to}.{half}")] = part
            continue
        if name.endswith("shared_mlp.output_linear.weight") and not model.config.num_local_experts:
            tensors[name.replace("shared_mlp.output_linear", "mlp.down_proj")] = tensor
            continue
        if not name.partition(".experts.")[2].startswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        if is_oss and not name.endswith("_bias"):
            tensor = tensor.transpose(1, 2)
        suffix = ".bias" if name.endswith("_bias") else ".weight"
        name = name.removesuffix("_bias")
        if "gate_up_proj" not in name:
            tensors[name + suffix] = tensor
            continue
        halves = (tensor[:, 0::2], tensor[:, 1::2]) if is_oss else tensor.chunk(2, 1)
        for half, part in zip(("gate_proj", "up_proj"), halves, strict=True):
            tensors[name.replace("gate_up_proj", half) + suffix] = part
    return tensors


def write_more(writer: gguf.GGUFWriter, config: Any) -> None:
    """What families have beyond Llama's keys."""

    def given(*names: str) -> Any:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if value is not None), None)

    keys = (
        (writer.add_expert_count, ("num_local_experts", "num_experts", "moe_num_experts")),
        (writer.add_expert_used_count, ("num_experts_per_tok", "moe_k")),
        (writer.add_expert_feed_forward_length, ("moe_intermediate_size",)),
        (writer.add_expert_shared_count, ("n_shared_experts", "moe_num_shared_experts")),
        (writer.add_expert_weights_scale, ("routed_scaling_factor",)),
        (writer.add_expert_shared_feed_forward_length, ("shared_expert_intermediate_size",)),
        (
            writer.add_leading_dense_block_count,
            ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
        ),
        (writer.add_shortconv_l_cache, ("conv_L_cache",)),
        (writer.add_logit_scale, ("logit_scale", "logits_scaling")),
        (writer.add_attention_scale, ("attention_multiplier",)),
        (writer.add_residual_scale, ("residual_multiplier",)),
        (writer.add_embedding_scale, ("embedding_multiplier",)),
        (writer.add_layer_norm_eps, ("layer_norm_eps",)),
    )
    for add, names in keys:
        if (value := given(*names)) is not None:
            add(value)
    rope = getattr(config, "rope_parameters", None) or {}
    if part := rope.get("partial_rotary_factor"):
        head_dim = given("head_dim") or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_dim * part))


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Llama's queries or keys, weights or biases, as llama.cpp orders them."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


# Converted by classes that llama.cpp derives from Llama's.
PERMUTED = ("granite", "granitehybrid", "granitemoe", "llama")


def write_mamba(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def write(file: Path, arch: str, model: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    kv_heads: Any = config.num_key_value_heads
    if {"conv", "linear_attention"} & set(types := getattr(config, "layer_types", None) or ()):
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in types]
    writer.add_head_count_kv(kv_heads)
    if arch == "granitehybrid":
        write_mamba(writer, config)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
    if eps := getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None):
        writer.add_layer_norm_rms_eps(eps)
    write_more(writer, config)
    write_rope(writer, config)
    if getattr(config, "sliding_window", None) and not arch.startswith("qwen2"):
        writer.add_sliding_window(config.sliding_window)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in unfused(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch in PERMUTED and ".q_proj." in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if arch in PERMUTED and ".k_proj." in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        name = name.removesuffix(".sinks") + ".sinks.weight" if name.endswith(".sinks") else name
        # As the released files call them.
        name = name.replace(".gate.moe_statics.", ".moe_statics.")
        if arch in ("granitemoe", "granitehybrid"):
            name = name.replace(".router.weight", ".router.layer.weight")
            name = name.replace("block_sparse_moe.experts.", "mlp.experts.")
        if "conv.conv" in name or "conv1d.weight" in name:
            tensor = tensor.squeeze(1)
        if name.endswith(".A_log"):
            tensor = -torch.exp(tensor)[:, None]
        if name.endswith("mamba.D"):
            tensor = tensor[:, None]
        if name.endswith("mamba.norm.weight"):
            tensor = tensor.view(config.mamba_n_groups, -1)
        name = name.replace(".dt_bias", ".dt_proj.bias")
        if name.endswith("expert_bias"):
            name += ".bias"
        if name.endswith("e_score_correction_bias"):
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            tensor = tensor.squeeze()
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # The file holds what each frequency is divided by.
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
        plain = rope["rope_theta"] ** (-torch.arange(len(found)) / len(found))
        writer.add_tensor("rope_freqs.weight", (plain / found).numpy())
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors((1 + math.log(factor) / math.log(original)) ** 0.5)
        for name in ("short", "long"):
            factors = torch.tensor(rope[f"{name}_factor"])
            writer.add_tensor(f"rope_factors_{name}.weight", factors.numpy())


def test_every_architecture_is_proven() -> None:
    assert {arch for arch, _, _ in CASES.values()} == set(GGUF_ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_is_what_transformers_computes(
    case: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    arch, family, config = CASES[case]
    path, model = save_tiny(family, **config)
    file = tmp_path / "model.gguf"
    write(file, arch, model)
    token_ids = random.Random(0).choices(range(3, 300), k=77)
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).logits[0]
    found = driver(file).logits(token_ids)
    # Gemma's logits reach 16 here: transformers' own float32 is 2e-4 from its float64.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    # The same weights from safetensors are the same model to the last bits.
    torch.testing.assert_close(found, driver(path).logits(token_ids), atol=1e-5, rtol=1e-5)
