"""A config.json from the GGUF keys of families with LayerNorm: Bloom, Falcon, MPT and others."""

from __future__ import annotations

from octavo.errors import ModelLoadError
from octavo.models.config import Getter
from octavo.models.gguf_facts import GgufFacts
from octavo.models.gguf_keys import Raw, attention, epsilon, rope


def bloom(get: Getter, facts: GgufFacts) -> Raw:
    """Bloom's; its files have all queries before all keys."""
    return {
        "architectures": ["BloomForCausalLM"],
        "num_attention_heads": get.int("attention.head_count"),
        "layer_norm_epsilon": epsilon(get),
        "stacks_qkv": True,
    }


def falcon(get: Getter, facts: GgufFacts) -> Raw:
    """Falcon's: 7B is 40B with one key-value head and one norm a layer."""
    return {
        "architectures": ["FalconForCausalLM"],
        "num_attention_heads": get.int("attention.head_count"),
        "num_kv_heads": get.int("attention.head_count_kv", 1),
        "ffn_hidden_size": get.int("feed_forward_length"),
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2 if "attn_norm_2" in facts.modules else 1,
        "layer_norm_epsilon": epsilon(get),
        "bias": "attn_qkv" in facts.biases,
        "stacks_qkv": True,
    }


def mpt(get: Getter, facts: GgufFacts) -> Raw:
    """MPT's."""
    heads, largest = get.int("attention.head_count"), get.float("attention.max_alibi_bias", 0.0)
    if get.int("attention.head_count_kv", heads) != heads:
        raise ModelLoadError("GGUF: MPT with fewer key-value heads than heads is not supported")
    return {
        "architectures": ["MptForCausalLM"],
        "num_attention_heads": heads,
        "attn_config": {
            "alibi": largest > 0,
            "alibi_bias_max": largest,
            "clip_qkv": get.values.get(f"{get.prefix}attention.clamp_kqv"),
        },
        "layer_norm_epsilon": epsilon(get),
    }


def phi2(get: Getter, facts: GgufFacts) -> Raw:
    """Phi 1's, 1.5's and 2's."""
    return {
        **_partly_rotated(get, facts),
        "architectures": ["PhiForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "layer_norm_eps": epsilon(get),
    }


def stablelm(get: Getter, facts: GgufFacts) -> Raw:
    """StableLM's; its files have the norms of all heads as one tensor."""
    return {
        **_partly_rotated(get, facts),
        "architectures": ["StableLmForCausalLM"],
        "intermediate_size": get.int("feed_forward_length"),
        "layer_norm_eps": epsilon(get),
        "use_qkv_bias": "attn_q" in facts.biases,
        "qk_layernorm": "attn_q_norm" in facts.modules,
        "use_parallel_residual": bool(get.values.get(f"{get.prefix}use_parallel_residual", True)),
        "stacks_head_norms": True,
    }


def _partly_rotated(get: Getter, facts: GgufFacts) -> Raw:
    shared = attention(get, facts)
    part = get.int("rope.dimension_count", shared["head_dim"]) / shared["head_dim"]
    return {**shared, "rope_parameters": {**rope(get), "partial_rotary_factor": part}}
