"""Keys of a config.json that many families' GGUF files hold alike."""

from __future__ import annotations

from typing import Any, TypeAlias

from octavo.errors import ModelLoadError
from octavo.models.config import Getter
from octavo.models.gguf_facts import GgufFacts, of_layers

Raw: TypeAlias = dict[str, Any]


def num_layers(get: Getter) -> int:
    """The layers without those that predict further tokens, which come last."""
    return get.int("block_count") - get.int("nextn_predict_layers", 0)


def rope(get: Getter) -> Raw:
    """A rotary embedding's parameters.

    Raises:
        ModelLoadError: a kind of scaling that is not supported.
    """
    kind = get.values.get(f"{get.prefix}rope.scaling.type") or "none"
    found: Raw = {"rope_type": "default", "rope_theta": get.float("rope.freq_base", 10000.0)}
    if kind == "none":
        return found
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(f"GGUF: rope.scaling.type {kind!r} is not supported")
    found |= {"rope_type": kind, "factor": get.float("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        key = "original_max_position_embeddings"
        found[key] = get.int("rope.scaling.original_context_length", get.int("context_length"))
        found["beta_fast"] = get.float("rope.scaling.yarn_beta_fast", 32.0)
        found["beta_slow"] = get.float("rope.scaling.yarn_beta_slow", 1.0)
    return found


def attention(get: Getter, facts: GgufFacts) -> Raw:
    """Heads, and which projections have biases."""
    heads = get.int("attention.head_count")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": max(of_layers(get, "attention.head_count_kv", heads)),
        "head_dim": get.int("attention.key_length", get.int("embedding_length") // max(heads, 1)),
        "attention_bias": "attn_q" in facts.biases,
        "mlp_bias": "ffn_down" in facts.biases,
    }


def epsilon(get: Getter, key: str = "attention.layer_norm_epsilon") -> float:
    """A norm's; files hold the float32 nearest to config.json's decimal."""
    return float(f"{get.float(key, 1e-5):.6g}")


def layer_types(get: Getter) -> list[str]:
    """Each layer's kind, local or global, where a file lists them.

    Raises:
        ModelLoadError: it does not, or the list is not one of all layers.
    """
    kinds = get.values.get(f"{get.prefix}attention.sliding_window_pattern")
    layers = num_layers(get)
    if not isinstance(kinds, list) or len(kinds) < layers:
        raise ModelLoadError(f"GGUF: {get.prefix}attention.sliding_window_pattern must list layers")
    return ["sliding_attention" if is_local else "full_attention" for is_local in kinds[:layers]]
