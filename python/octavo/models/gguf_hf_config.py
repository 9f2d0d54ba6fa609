"""A config.json from a GGUF file's keys, for families whose layers read one of their own.

Key by key what llama.cpp's converters write; what they fold into weights is 1 here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from octavo.models.config import Getter
from octavo.models.gguf_facts import GgufFacts, of_layers
from octavo.models.gguf_gemma_config import gemma3n, gemma4
from octavo.models.gguf_keys import Raw, attention, epsilon, layer_types, num_layers, rope
from octavo.models.gguf_layer_norm_config import bloom, falcon, mpt, phi2, stablelm

_Keys = Callable[[Getter, GgufFacts], Raw]
# llama.cpp's expert_gating_func.
_SIGMOID: Final = 2
_MAVERICK_EXPERTS: Final = 128


def hf_config(arch: str, get: Getter, facts: GgufFacts) -> Raw:
    """The config.json of a file of one of GGUF_HF_CONFIGS.

    Raises:
        ModelLoadError: a key is missing, or of another kind.
    """
    raw: Raw = {
        "vocab_size": facts.vocab_size,
        "hidden_size": get.int("embedding_length"),
        "num_hidden_layers": num_layers(get),
        "max_position_embeddings": get.int("context_length", 2048),
        # Files hold the float32 nearest to config.json's decimal.
        "rms_norm_eps": float(f"{get.float('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "tie_word_embeddings": facts.tied,
        "rope_parameters": rope(get),
    }
    return {**raw, **GGUF_HF_CONFIGS[arch](get, facts)}


def _falcon_h1(get: Getter, facts: GgufFacts) -> Raw:
    return {
        **attention(get, facts),
        "architectures": ["FalconH1ForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "mamba_d_ssm": get.int("ssm.inner_size"),
        "mamba_n_heads": get.int("ssm.time_step_rank"),
        "mamba_n_groups": get.int("ssm.group_count", 1),
        "mamba_d_state": get.int("ssm.state_size"),
        "mamba_d_conv": get.int("ssm.conv_kernel"),
        "mamba_rms_norm": "ssm_norm" in facts.modules,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": "ssm_in" in facts.biases,
        "projectors_bias": "ssm_out" in facts.biases,
        "mamba_conv_bias": "ssm_conv1d" in facts.biases,
    }


def _state_space(get: Getter, facts: GgufFacts, prefix: str = "") -> Raw:
    """Mamba-2's own names; ``prefix``: of those that are attention's elsewhere."""
    heads = get.int("ssm.time_step_rank")
    return {
        f"{prefix}num_heads": heads,
        f"{prefix}head_dim": get.int("ssm.inner_size") // max(heads, 1),
        "n_groups": get.int("ssm.group_count", 1),
        "conv_kernel": get.int("ssm.conv_kernel"),
        "layer_norm_epsilon": epsilon(get, "attention.layer_norm_rms_epsilon"),
        "use_bias": "ssm_in" in facts.biases,
        "use_conv_bias": "ssm_conv1d" in facts.biases,
    }


def _mamba2(get: Getter, facts: GgufFacts) -> Raw:
    return {
        **_state_space(get, facts),
        "architectures": ["Mamba2ForCausalLM"],
        "state_size": get.int("ssm.state_size"),
        # The file's is a number that stands for none.
        "max_position_embeddings": None,
    }


def _nemotron_h(get: Getter, facts: GgufFacts) -> Raw:
    heads = of_layers(get, "attention.head_count_kv")
    widths = of_layers(get, "feed_forward_length")
    experts = get.int("expert_count", 0)
    kinds = [
        "attention" if count else ("moe" if experts else "mlp") if width else "mamba"
        for count, width in zip(heads, widths, strict=True)
    ]
    count = num_layers(get)
    raw = {
        **attention(get, facts),
        **_state_space(get, facts, "mamba_"),
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": kinds[:count],
        "intermediate_size": max(widths),
        "ssm_state_size": get.int("ssm.state_size"),
    }
    return raw | (_nemotron_experts(get) if experts else {})


def _nemotron_experts(get: Getter) -> Raw:
    return {
        "n_routed_experts": get.int("expert_count"),
        "num_experts_per_tok": get.int("expert_used_count"),
        "moe_intermediate_size": get.int("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": get.int("expert_shared_feed_forward_length"),
        "moe_latent_size": get.int("moe_latent_size", 0),
        "n_group": get.int("expert_group_count", 1),
        "topk_group": get.int("expert_group_used_count", 1),
        "norm_topk_prob": bool(get.values.get(f"{get.prefix}expert_weights_norm", True)),
        "routed_scaling_factor": get.float("expert_weights_scale", 1.0),
    }


def _deepseek(get: Getter, facts: GgufFacts) -> Raw:
    rope_dim = get.int("rope.dimension_count")
    # Files from before the two were split have a head's own sizes without ``_mla``.
    query = get.int("attention.key_length_mla", get.int("attention.key_length"))
    is_v3 = get.int("expert_gating_func", 1) == _SIGMOID
    groups = get.int("expert_group_count", 1)
    rotary = rope(get)
    multiplier = get.float("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:
        # Both of config.json's factors, of which the models have equal ones; the key holds a tenth.
        rotary |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
    experts = get.int("expert_count", 0)
    layers = num_layers(get)
    return {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "rope_parameters": rotary,
        "num_attention_heads": get.int("attention.head_count"),
        "intermediate_size": get.int("feed_forward_length"),
        "attention_bias": "attn_kv_a_mqa" in facts.biases,
        "q_lora_rank": get.int("attention.q_lora_rank", 0),
        "kv_lora_rank": get.int("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": query - rope_dim,
        "v_head_dim": get.int("attention.value_length_mla", get.int("attention.value_length")),
        "first_k_dense_replace": get.int("leading_dense_block_count", 0) if experts else layers,
        "n_routed_experts": max(experts, 1),
        "num_experts_per_tok": get.int("expert_used_count", 1),
        "n_shared_experts": get.int("expert_shared_count", 0),
        "moe_intermediate_size": get.int("expert_feed_forward_length", 1),
        "norm_topk_prob": bool(get.values.get(f"{get.prefix}expert_weights_norm", False)),
        "routed_scaling_factor": get.float("expert_weights_scale", 1.0),
        "n_group": groups,
        "topk_group": get.int("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }


def _qwen_delta(get: Getter, facts: GgufFacts) -> Raw:
    shared = attention(get, facts)
    heads, values = get.int("ssm.time_step_rank"), get.int("ssm.inner_size")
    part = get.int("rope.dimension_count", shared["head_dim"]) / shared["head_dim"]
    expert_size = get.int("expert_feed_forward_length", 1)
    return {
        **shared,
        "rope_parameters": {**rope(get), "partial_rotary_factor": part},
        "full_attention_interval": get.int("full_attention_interval", 4),
        "linear_num_key_heads": get.int("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": get.int("ssm.state_size"),
        "linear_value_head_dim": values // max(heads, 1),
        "linear_conv_kernel_dim": get.int("ssm.conv_kernel"),
        "intermediate_size": get.int("feed_forward_length", expert_size),
        "num_experts": get.int("expert_count", 0),
        "num_experts_per_tok": get.int("expert_used_count", 1),
        "moe_intermediate_size": expert_size,
        "shared_expert_intermediate_size": get.int("expert_shared_feed_forward_length", 1),
    }


def _smollm3(get: Getter, facts: GgufFacts) -> Raw:
    return {
        **attention(get, facts),
        "architectures": ["SmolLM3ForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
    }


def _ministral3(get: Getter, facts: GgufFacts) -> Raw:
    # Of both factors of yarn, which the models have equal, files hold one.
    scale = get.float("rope.scaling.yarn_log_multiplier", 1.0)
    rotary = {**rope(get), "mscale": scale, "mscale_all_dim": scale}
    return {
        **attention(get, facts),
        "architectures": ["Ministral3ForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "sliding_window": get.int("attention.sliding_window", 0),
        "rope_parameters": {
            **rotary,
            "llama_4_scaling_beta": get.float("attention.temperature_scale", 0.0),
        },
    }


def _mamba(get: Getter, facts: GgufFacts) -> Raw:
    """Mamba's first form; FalconMamba's files say that they norm a mixer's three."""
    is_falcon = bool(get.values.get(f"{get.prefix}ssm.dt_b_c_rms"))
    return {
        "architectures": ["FalconMambaForCausalLM" if is_falcon else "MambaForCausalLM"],
        "intermediate_size": get.int("ssm.inner_size"),
        "state_size": get.int("ssm.state_size"),
        "conv_kernel": get.int("ssm.conv_kernel"),
        "time_step_rank": get.int("ssm.time_step_rank"),
        "layer_norm_epsilon": epsilon(get, "attention.layer_norm_rms_epsilon"),
        "use_bias": "ssm_in" in facts.biases,
        "use_conv_bias": "ssm_conv1d" in facts.biases,
        # The file's is a number that stands for none.
        "max_position_embeddings": None,
    }


def _jamba(get: Getter, facts: GgufFacts) -> Raw:
    heads = of_layers(get, "attention.head_count_kv")
    experts = facts.modules.get("ffn_down_exps", frozenset())
    return {
        **attention(get, facts),
        "architectures": ["JambaForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "layers_block_type": ["attention" if count else "mamba" for count in heads],
        "layers_num_experts": [
            get.int("expert_count") if layer in experts else 1 for layer in range(num_layers(get))
        ],
        "num_experts": get.int("expert_count") if experts else 1,
        "num_experts_per_tok": get.int("expert_used_count", 1),
        "mamba_expand": get.int("ssm.inner_size") / get.int("embedding_length"),
        "mamba_d_state": get.int("ssm.state_size"),
        "mamba_d_conv": get.int("ssm.conv_kernel"),
        "mamba_dt_rank": get.int("ssm.time_step_rank"),
        "mamba_proj_bias": "ssm_in" in facts.biases,
        "mamba_conv_bias": "ssm_conv1d" in facts.biases,
    }


def _kimi_linear(get: Getter, facts: GgufFacts) -> Raw:
    heads, rope_dim = get.int("attention.head_count"), get.int("rope.dimension_count")
    types = [
        "full_attention" if count else "linear_attention"
        for count in of_layers(get, "attention.head_count_kv")
    ]
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "num_attention_heads": heads,
        "intermediate_size": get.int("feed_forward_length"),
        "layer_types": types[: num_layers(get)],
        "linear_num_heads": heads,
        "linear_head_dim": get.int("kda.head_dim"),
        "linear_conv_kernel_dim": get.int("ssm.conv_kernel"),
        "q_lora_rank": get.int("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": get.int("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": get.int("attention.key_length_mla") - rope_dim,
        "v_head_dim": get.int("attention.value_length_mla"),
        "first_k_dense_replace": get.int("leading_dense_block_count", 0),
        "num_experts": get.int("expert_count"),
        "num_experts_per_token": get.int("expert_used_count"),
        "num_shared_experts": get.int("expert_shared_count", 0),
        "moe_intermediate_size": get.int("expert_feed_forward_length"),
        "moe_renormalize": bool(get.values.get(f"{get.prefix}expert_weights_norm", True)),
        "routed_scaling_factor": get.float("expert_weights_scale", 1.0),
        "num_expert_group": get.int("expert_group_count", 1),
        "topk_group": get.int("expert_group_used_count", 1),
    }


def _mimo2(get: Getter, facts: GgufFacts) -> Raw:
    types = layer_types(get)
    heads = of_layers(get, "attention.head_count_kv")
    pairs = list(zip(types, heads, strict=False))
    local, whole = (
        max((count for kind, count in pairs if (kind == "sliding_attention") == wanted), default=1)
        for wanted in (True, False)
    )
    shared = attention(get, facts)
    rotary = {
        "rope_type": "default",
        "partial_rotary_factor": get.int("rope.dimension_count") / shared["head_dim"],
    }
    experts = facts.modules.get("ffn_down_exps", frozenset())
    return {
        **shared,
        "architectures": ["MiMoV2FlashForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "num_key_value_heads": whole,
        "swa_num_key_value_heads": local,
        "v_head_dim": get.int("attention.value_length"),
        "attention_value_scale": get.float("attention.value_scale", 1.0),
        "sliding_window": get.int("attention.sliding_window"),
        "layer_types": types,
        "mlp_layer_types": [
            "sparse" if layer in experts else "dense" for layer in range(num_layers(get))
        ],
        "rope_parameters": {
            "full_attention": {**rotary, "rope_theta": get.float("rope.freq_base", 10000.0)},
            "sliding_attention": {**rotary, "rope_theta": get.float("rope.freq_base_swa", 10000.0)},
        },
        "n_routed_experts": get.int("expert_count"),
        "num_experts_per_tok": get.int("expert_used_count"),
        "moe_intermediate_size": get.int("expert_feed_forward_length"),
        "norm_topk_prob": bool(get.values.get(f"{get.prefix}expert_weights_norm", True)),
        "routed_scaling_factor": get.float("expert_weights_scale", 1.0),
        "n_group": get.int("expert_group_count", 1),
        "topk_group": get.int("expert_group_used_count", 1),
    }


def _llama4(get: Getter, facts: GgufFacts) -> Raw:
    # A file that names a window of 0 has no chunks, and rope in all layers; others do not name it.
    is_whole = get.int("attention.sliding_window", 1) == 0
    whole: Raw = {"attention_chunk_size": None, "no_rope_layers": [1] * num_layers(get)}
    experts = get.int("expert_count", 0)
    return {
        **attention(get, facts),
        "architectures": ["Llama4ForCausalLM"],
        "intermediate_size_mlp": get.int("feed_forward_length"),
        "intermediate_size": get.int("expert_feed_forward_length"),
        "interleave_moe_layer_step": get.int("interleave_moe_layer_step", 1),
        "moe_layers": sorted(facts.modules.get("ffn_down_exps", ())),
        "num_local_experts": max(experts, 1),
        "num_experts_per_tok": get.int("expert_used_count", 1),
        # As llama.cpp knows them: Scout norms queries and keys, Maverick does not.
        "use_qk_norm": experts != _MAVERICK_EXPERTS,
        **(whole if is_whole else {}),
    }


def _qwen3_next(get: Getter, facts: GgufFacts) -> Raw:
    # Older files have one projection for all, as config.json's do.
    splits = "ssm_in" not in facts.modules
    return {
        **_qwen_delta(get, facts),
        "architectures": ["Qwen3NextForCausalLM"],
        "splits_delta_inputs": splits,
    }


def _qwen3_5(get: Getter, facts: GgufFacts) -> Raw:
    name = "Qwen3_5MoeForCausalLM" if get.int("expert_count", 0) else "Qwen3_5ForCausalLM"
    return {**_qwen_delta(get, facts), "architectures": [name], "tiles_value_heads": True}


GGUF_HF_CONFIGS: Final[Mapping[str, _Keys]] = {
    "bloom": bloom,
    "deepseek2": _deepseek,
    "falcon": falcon,
    "falcon-h1": _falcon_h1,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "jamba": _jamba,
    "kimi-linear": _kimi_linear,
    "llama4": _llama4,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "mimo2": _mimo2,
    "mistral3": _ministral3,
    "mpt": mpt,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "phi2": phi2,
    "qwen35": _qwen3_5,
    "qwen35moe": _qwen3_5,
    "qwen3next": _qwen3_next,
    "smollm3": _smollm3,
    "stablelm": stablelm,
}
