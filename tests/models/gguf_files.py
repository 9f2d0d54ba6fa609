"""A transformers decoder's weights as a GGUF file, as llama.cpp's converters write it.

Names come from the ``gguf`` package, not from the loader.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import gguf_more_files
import torch


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
    # Nemotron-H's config.json has those of experts that its files of plain MLPs have not.
    is_plain = writer.arch == "nemotron_h"
    for add, names in keys:
        if is_plain and "expert" in add.__name__:
            continue
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
PERMUTED = ("granite", "granitehybrid", "granitemoe", "llama", "mistral3", "smollm3")


def write_mamba(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def write_latent(writer: gguf.GGUFWriter, config: Any, splits: bool) -> None:
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if splits:
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(query)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_key_length(query)
        writer.add_value_length(config.v_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    is_v3 = config.model_type == "deepseek_v3"
    kind = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kind.SIGMOID if is_v3 else kind.SOFTMAX)
    writer.add_expert_weights_norm(is_v3)
    if scale := config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)


def write_states(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    """Of a family whose layers keep a state."""
    if arch.startswith("qwen3"):
        heads, inner = config.linear_num_value_heads, config.linear_value_head_dim
        inner, groups = heads * inner, config.linear_num_key_heads
        state, width = config.linear_key_head_dim, config.linear_conv_kernel_dim
        writer.add_full_attention_interval(4)
        part = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_count(int(config.head_dim * part))
    elif arch == "falcon-h1":
        heads, inner, groups = config.mamba_n_heads, config.mamba_d_ssm, config.mamba_n_groups
        state, width = config.mamba_d_state, config.mamba_d_conv
    elif arch == "mamba2":
        heads, groups, state = config.num_heads, config.n_groups, config.state_size
        inner, width = heads * config.head_dim, config.conv_kernel
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    else:
        heads, groups, state = config.mamba_num_heads, config.n_groups, config.ssm_state_size
        inner, width = heads * config.mamba_head_dim, config.conv_kernel
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        kinds = config.layers_block_type
        size = config.moe_intermediate_size if "moe" in kinds else config.intermediate_size
        writer.add_feed_forward_length([size if kind in ("mlp", "moe") else 0 for kind in kinds])
    if arch == "nemotron_h_moe":
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_ssm_conv_kernel(width)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_time_step_rank(heads)


def of_falcon(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """With the factors that llama.cpp folds into a weight."""
    gate, down = config.mlp_multipliers
    own = config.attention_in_multiplier
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config.key_multiplier * own,
        "q_proj": own,
        "v_proj": own,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    module = name.split(".")[-2]
    if module == "in_proj":
        group = config.mamba_n_groups * config.mamba_d_state
        sizes = (config.mamba_d_ssm, config.mamba_d_ssm, group, group, config.mamba_n_heads)
        parts = tensor.split(sizes)
        scaled = zip(parts, config.ssm_multipliers, strict=True)
        return torch.cat([part * factor for part, factor in scaled]) * config.ssm_in_multiplier
    return tensor * factors.get(module, 1.0)


def of_delta(name: str, tensor: torch.Tensor, config: Any, case: str) -> dict[str, torch.Tensor]:
    """A tensor of Qwen3-Next or Qwen3.5 as llama.cpp splits and orders it."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    ratio, size = values // keys, config.linear_value_head_dim
    key_rows = 2 * keys * config.linear_key_head_dim
    prefix, _, module = name.partition(".linear_attn.")
    if name.endswith("norm.weight") and module != "norm.weight":
        return {name: tensor + 1}
    if module.startswith("in_proj_qkvz") and "inputs as one" not in case:
        grouped = tensor.view(keys, -1, tensor.shape[1])
        d = config.linear_key_head_dim
        q, k, v, z = (
            part.reshape(-1, tensor.shape[1])
            for part in grouped.split([d, d, ratio * size, ratio * size], 1)
        )
        name = f"{prefix}.linear_attn.in_proj_"
        return {f"{name}qkv.weight": torch.cat([q, k, v]), f"{name}z.weight": z}
    if not module or config.model_type.startswith("qwen3_next"):
        return {name: tensor}

    def tiled(values: torch.Tensor) -> torch.Tensor:
        split = values.reshape(keys, ratio, -1, *values.shape[1:])
        return split.swapaxes(0, 1).reshape(values.shape)

    if module.startswith(("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias")):
        tensor = tiled(tensor)
    elif module.startswith(("in_proj_qkv", "conv1d")):
        tensor = torch.cat([tensor[:key_rows], tiled(tensor[key_rows:])])
    elif module.startswith("out_proj"):
        tensor = tiled(tensor.T.contiguous()).T
    return {name: tensor}


def of_latent(name: str, tensor: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """What keys and values unfold from, apart, the keys' transposed."""
    sizes = [config.qk_nope_head_dim, config.v_head_dim]
    heads = tensor.view(config.num_attention_heads, sum(sizes), -1)
    keys, values = heads.split(sizes, 1)
    return {
        name.replace("kv_b_proj", "k_b_proj"): keys.transpose(1, 2),
        name.replace("kv_b_proj", "v_b_proj"): values,
    }


def as_written(model: Any, arch: str, case: str) -> dict[str, torch.Tensor]:
    """A model's tensors as llama.cpp splits, scales and orders them, by the names that it reads."""
    found: dict[str, torch.Tensor] = {}
    tensors = unfused(model) if arch not in ("gemma4", "llama4") else model.state_dict()
    for name, tensor in gguf_more_files.stacked(tensors).items():
        if arch.startswith("nemotron"):
            # As transformers saves them, too.
            name = name.replace("model.", "backbone.")
            name += ".weight" if name.endswith("experts.up_proj") else ""
            found[name] = tensor
        elif arch == "falcon-h1":
            found[name] = of_falcon(name, tensor, model.config)
        elif arch.startswith(("qwen3next", "qwen35")):
            found |= of_delta(name, tensor, model.config, case)
        elif name.endswith("kv_b_proj.weight") and "as one" not in case:
            found |= of_latent(name, tensor, model.config)
        elif arch in gguf_more_files.TENSORS:
            found |= gguf_more_files.TENSORS[arch](name, tensor, model.config)
        else:
            found[name] = tensor
    return found


def write_gguf(file: Path, arch: str, model: Any, case: str = "") -> None:
    config = model.config
    # Of layers that differ, their own are read below.
    config.allow_global_per_layer_attribute_access = True
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if not arch.startswith(("nemotron", "qwen35moe")):
        writer.add_feed_forward_length(getattr(config, "intermediate_size", 0))
    writer.add_head_count(getattr(config, "num_attention_heads", 0) if arch != "mamba2" else 0)
    kv_heads: Any = getattr(config, "num_key_value_heads", 0)
    if arch == "deepseek2":
        kv_heads = 1
        write_latent(writer, config, "as one" not in case)
    elif arch in ("falcon-h1", "mamba2") or arch.startswith(("nemotron", "qwen3next", "qwen35")):
        write_states(writer, config, arch)
    if arch.startswith("nemotron"):
        kinds = config.layers_block_type
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in kinds]
    elif arch.startswith(("qwen3next", "qwen35", "mamba2")):
        pass
    elif {"conv", "linear_attention"} & set(types := getattr(config, "layer_types", None) or ()):
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in types]
    writer.add_head_count_kv(kv_heads)
    if arch == "granitehybrid":
        write_mamba(writer, config)
    head_dim = getattr(config, "head_dim", None)
    if head_dim and arch not in ("deepseek2", "mamba2"):
        writer.add_key_length(head_dim)
    if eps := getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None):
        writer.add_layer_norm_rms_eps(eps)
    write_more(writer, config)
    write_rope(writer, config)
    if arch in gguf_more_files.KEYS:
        gguf_more_files.KEYS[arch](writer, config)
    if arch == "olmo2" and config.model_type == "olmo3":
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    if getattr(config, "sliding_window", None) and not arch.startswith("qwen2"):
        writer.add_sliding_window(config.sliding_window)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in as_written(model, arch, case).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.startswith("blk."):
            writer.add_tensor(name, tensor.contiguous().numpy())
            continue
        if arch in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
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
            tensor = -torch.exp(tensor)
            tensor = tensor[:, None] if tensor.dim() == 1 else tensor
        if name.endswith(".D") and arch not in ("jamba", "mamba"):
            tensor = tensor[:, None]
        if name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
            groups = getattr(config, "mamba_n_groups", None) or config.n_groups
            tensor = tensor.view(groups, -1)
        in_moe = arch == "nemotron_h_moe"
        name = name.replace(".dt_bias", ".dt.bias" if in_moe else ".dt_proj.bias")
        if in_moe and ".mixer.experts." in name:
            name = name.replace("backbone", "model").replace(".mixer.", ".mlp.")
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
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if beta := rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(beta)
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
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
