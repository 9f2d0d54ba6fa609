"""What llama.cpp's converters write of families with keys or orders of their own, beside Llama's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import torch

Writer = gguf.GGUFWriter


def _write_bloom(writer: Writer, config: Any) -> None:
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _write_falcon(writer: Writer, config: Any) -> None:
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count_kv(config.num_kv_heads if config.new_decoder_architecture else 1)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _write_mpt(writer: Writer, config: Any) -> None:
    _write_bloom(writer, config)
    writer.add_max_alibi_bias(float(config.attn_config.alibi_bias_max))


def _write_stablelm(writer: Writer, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _write_jamba(writer: Writer, config: Any) -> None:
    kinds = config.layers_block_type
    kv_heads = config.num_key_value_heads
    writer.add_head_count_kv([kv_heads if kind == "attention" else 0 for kind in kinds])
    _write_first_form(writer, config.mamba_expand * config.hidden_size, config.mamba_d_state)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_time_step_rank(config.mamba_dt_rank)


def _write_mamba(writer: Writer, config: Any) -> None:
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    _write_first_form(writer, config.intermediate_size, config.state_size)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")


def _write_first_form(writer: Writer, inner: int, state: int) -> None:
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)


def _write_kimi(writer: Writer, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_kda_head_dim(config.linear_head_dim)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    kinds = config.layer_types
    writer.add_head_count_kv([int(kind == "full_attention") for kind in kinds])
    writer.add_leading_dense_block_count(config.mlp_layer_types.count("dense"))
    writer.add_expert_shared_count(config.n_shared_experts)


def _is_local(config: Any) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.layer_types]


def _write_mimo(writer: Writer, config: Any) -> None:
    rope = config.rope_parameters["full_attention"]
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_sliding_window_pattern(_is_local(config))
    writer.add_value_length(config.v_head_dim)
    writer.add_float32("mimo2.attention.value_scale", config.attention_value_scale)
    kv_heads = config.num_key_value_heads
    writer.add_head_count_kv([2 * kv_heads if local else kv_heads for local in _is_local(config)])
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def _of_layers(config: Any) -> list[Any]:
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def _write_llama4(writer: Writer, config: Any) -> None:
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)


def _write_gemma3n(writer: Writer, config: Any) -> None:
    _write_local(writer, config)
    writer.add_altup_active_idx(config.altup_active_idx)
    writer.add_altup_num_inputs(config.altup_num_inputs)
    parts = torch.tensor(config.activation_sparsity_pattern)
    writer.add_activation_sparsity_scale(torch.special.ndtri(parts).tolist())


def _write_local(writer: Writer, config: Any) -> None:
    """Of Gemma 3n and 4."""
    writer.add_sliding_window_pattern(_is_local(config))
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_gemma4(writer: Writer, config: Any) -> None:
    _write_local(writer, config)
    local = _is_local(config)
    layers = _of_layers(config)
    whole = layers[local.index(False)]
    writer.add_key_length(whole.head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    if config.use_double_wide_mlp:
        first = config.num_hidden_layers - config.num_kv_shared_layers
        size = config.intermediate_size
        sizes = [size if layer < first else 2 * size for layer in range(len(layers))]
        writer.add_feed_forward_length(sizes)
    if config.enable_moe_block:
        writer.add_expert_used_count(config.top_k_experts)
    rope = config.rope_parameters["full_attention"]
    turned = int(whole.head_dim * rope["partial_rotary_factor"] / 2)
    factors = [1.0] * turned + [1e30] * (whole.head_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())


# An architecture's own keys, written over those of all.
KEYS: Mapping[str, Callable[[Writer, Any], None]] = {
    "bloom": _write_bloom,
    "falcon": _write_falcon,
    "gemma3n": _write_gemma3n,
    "gemma4": _write_gemma4,
    "jamba": _write_jamba,
    "kimi-linear": _write_kimi,
    "llama4": _write_llama4,
    "mamba": _write_mamba,
    "mimo2": _write_mimo,
    "mpt": _write_mpt,
    "stablelm": _write_stablelm,
}


def _of_bloom(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    name = name.removeprefix("transformer.")
    if "query_key_value" in name:
        heads = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        tensor = heads.transpose(0, 1).reshape(tensor.shape)
    return {name: tensor}


def _of_falcon(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    if "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        size = config.hidden_size // config.num_attention_heads
        heads = tensor.view(groups, -1, size, *tensor.shape[1:])
        parts = (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])
        tensor = torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    return {name: tensor}


def _of_llama4(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    if name.endswith("experts.gate_up_proj"):
        gates, ups = tensor.transpose(1, 2).chunk(2, 1)
        return {
            name.replace("gate_up_proj", "gate_proj.weight"): gates,
            name.replace("gate_up_proj", "up_proj.weight"): ups,
        }
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": tensor.transpose(1, 2)}
    return {name: tensor}


def _of_gemma3n(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    if "embed_tokens_per_layer" in name:
        missing = config.vocab_size - len(tensor)
        tensor = torch.cat([tensor, torch.zeros(missing, tensor.shape[1])])
    return {f"{name}.weight" if name.endswith("_scale") else name: tensor}


def _of_gemma4(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    for theirs, ours in (("ffn_gate_inp", "router.scale"), ("ffn_down_exps", "per_expert_scale")):
        if name.endswith(ours):
            return {f"blk.{re.findall('[0-9]+', name)[0]}.{theirs}.scale": tensor}
    if name.endswith("layer_scalar") or ".experts." in name:
        name += ".weight"
    return {name: tensor}


def _of_kimi(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    name = name.replace(".forget_gate.", ".")
    if name.endswith("self_attn.conv1d.weight"):
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("conv1d", f"{part}_conv1d"): taps for part, taps in parts}
    return {name: tensor}


# A transformers tensor -> those that the file has of it; what begins with "blk." is the file's name.
TENSORS: Mapping[str, Callable[[str, torch.Tensor, Any], dict[str, torch.Tensor]]] = {
    "bloom": _of_bloom,
    "falcon": _of_falcon,
    "gemma3n": _of_gemma3n,
    "gemma4": _of_gemma4,
    "kimi-linear": _of_kimi,
    "llama4": _of_llama4,
}


def stacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AltUp's matrices, and heads' norms, each kind as one tensor."""
    found: dict[str, torch.Tensor] = {}
    several: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        numbered = re.fullmatch(r"(.+\.altup_\w+|.+_layernorm\.norms)\.\d+\.weight", name)
        if numbered is None:
            found[name] = tensor
        else:
            several.setdefault(numbered[1].removesuffix(".norms"), []).append(tensor)
    return found | {f"{name}.weight": torch.stack(parts) for name, parts in several.items()}
