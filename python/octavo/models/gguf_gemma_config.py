"""A config.json from the GGUF keys of Gemma 3n and Gemma 4."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

from octavo.errors import ModelLoadError
from octavo.models.config import Getter
from octavo.models.gguf_facts import GgufFacts, of_layers
from octavo.models.gguf_keys import Raw, attention, layer_types, num_layers, rope


def gemma3n(get: Getter, facts: GgufFacts) -> Raw:
    """Gemma 3n's; its files have AltUp's matrices as one tensor.

    Raises:
        ModelLoadError: a key is missing, or of another kind.
    """
    key = f"{get.prefix}activation_sparsity_scale"
    scales = get.values.get(key)
    if not isinstance(scales, Sequence):
        raise ModelLoadError(f"GGUF: {key} must be a list of numbers")
    return {
        **_shared(get, facts),
        "architectures": ["Gemma3nForCausalLM"],
        "rope_local_base_freq": get.float("rope.freq_base_swa", 10000.0),
        "intermediate_size": of_layers(get, "feed_forward_length"),
        "altup_num_inputs": get.int("altup.num_inputs"),
        "altup_active_idx": get.int("altup.active_idx"),
        "laurel_rank": facts.laurel_rank,
        # Files hold how many deviations that part is, the float32 nearest to config.json's decimal.
        "activation_sparsity_pattern": [
            float(f"{NormalDist().cdf(float(scale)):.6g}") for scale in scales
        ],
        "stacks_altup": True,
    }


def gemma4(get: Getter, facts: GgufFacts) -> Raw:
    """Gemma 4's. Its files turn all of a global head, most of it by next to nothing."""
    types, heads = layer_types(get), of_layers(get, "attention.head_count_kv")
    sizes = of_layers(get, "feed_forward_length")
    shared = get.int("attention.shared_kv_layers", 0)
    first = min(layer for layer, kind in enumerate(types) if kind == "full_attention")
    local = [count for kind, count in zip(types, heads, strict=False) if kind != "full_attention"]
    theta = get.float("rope.freq_base", 1000000.0)
    local_theta = get.float("rope.freq_base_swa", 10000.0)
    has_experts = "ffn_gate_inp" in facts.modules
    return {
        **_shared(get, facts),
        "architectures": ["Gemma4ForCausalLM"],
        "head_dim": get.int("attention.key_length_swa"),
        "global_head_dim": get.int("attention.key_length"),
        "num_key_value_heads": max(local, default=heads[first]),
        "num_global_key_value_heads": heads[first],
        "attention_k_eq_v": first not in facts.modules.get("attn_v", ()),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": shared > 0 and sizes[-1] == 2 * sizes[0],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "enable_moe_block": has_experts,
        "num_experts": get.int("expert_count", 0) if has_experts else None,
        "top_k_experts": get.int("expert_used_count", 0) if has_experts else None,
        "moe_intermediate_size": get.int("expert_feed_forward_length", 0) if has_experts else None,
    }


def _shared(get: Getter, facts: GgufFacts) -> Raw:
    return {
        **attention(get, facts),
        "rope_parameters": {"full_attention": rope(get)},
        "hidden_size_per_layer_input": get.int("embedding_length_per_layer_input", 0),
        # Tables of both kinds are padded to one vocabulary.
        "vocab_size_per_layer_input": facts.vocab_size,
        "num_kv_shared_layers": get.int("attention.shared_kv_layers", 0),
        "layer_types": layer_types(get)[: num_layers(get)],
        "sliding_window": get.int("attention.sliding_window"),
        "final_logit_softcapping": get.float("final_logit_softcapping", 0.0),
    }
