"""ModelConfig from a GGUF file's metadata and its tensors' shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import ModelLoadError
from octavo.layers.rope import RopeConfig
from octavo.models.config import Getter, ModelConfig, StateShape, token_ids
from octavo.models.gguf_encoder import GGUF_ENCODERS
from octavo.models.gguf_facts import GgufFacts, of_layers
from octavo.models.gguf_hf_config import GGUF_HF_CONFIGS, hf_config
from octavo.models.gguf_keys import num_layers
from octavo.models.hf_config import HfConfig, architecture_of, max_context_len
from octavo.models.mamba import mamba_shape
from octavo.models.registry import model_class


def config_from_gguf(metadata: Mapping[str, Any], facts: GgufFacts) -> ModelConfig:
    """The shape of the model in a GGUF file.

    Raises:
        ModelLoadError: an unknown architecture, or a value that is missing or impossible.
    """
    arch = str(metadata.get("general.architecture", ""))
    get = Getter(metadata, "GGUF", f"{arch}.")
    if arch in GGUF_HF_CONFIGS:
        return _of_hf_keys(arch, get, facts)
    if arch not in GGUF_ARCHITECTURES:
        names = [*GGUF_ARCHITECTURES, *GGUF_HF_CONFIGS, *GGUF_ENCODERS]
        known = ", ".join(sorted(names))
        raise ModelLoadError(f"GGUF architecture {arch!r} is not supported; known: {known}")
    architecture, family = GGUF_ARCHITECTURES[arch]
    num_heads = get.int("attention.head_count")
    if num_heads < 1:
        raise ModelLoadError(f"GGUF: {arch}.attention.head_count must be positive")
    hidden_size = get.int("embedding_length")
    head_dim = get.int("attention.key_length", hidden_size // num_heads)
    max_positions = get.int("context_length", 2048)
    rope = _rope(get, head_dim, max_positions, facts)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": facts.vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": get.int("feed_forward_length"),
        "num_layers": num_layers(get),
        "num_heads": num_heads,
        "num_kv_heads": max(of_layers(get, "attention.head_count_kv", num_heads)),
        "head_dim": head_dim,
        # Files hold the float32 nearest to config.json's decimal.
        "rms_norm_eps": float(f"{get.float('attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope": rope,
        "max_position_embeddings": max_positions,
        # llama.cpp's context_length is already the scaled one.
        "max_context_len": max_context_len(rope, max_positions)
        if rope.rope_type == "longrope"
        else max_positions,
        "tie_word_embeddings": facts.tied,
        "attention_bias": "attn_q" in facts.biases,
        "attention_out_bias": "attn_output" in facts.biases,
        "mlp_bias": "ffn_down" in facts.biases,
        "eos_token_ids": _end_ids(metadata),
        "dtype": "bfloat16",
        "raw": dict(metadata),
    }
    found = {**fields, "modules": facts.modules, "biases": facts.biases}
    return ModelConfig(**{**fields, **family(get, found)})


def _end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    eos = token_ids(metadata.get("tokenizer.ggml.eos_token_id"))
    eot = token_ids(metadata.get("tokenizer.ggml.eot_token_id"))
    return (*eos, *(i for i in eot if i not in eos))


def _of_hf_keys(arch: str, get: Getter, facts: GgufFacts) -> ModelConfig:
    raw = hf_config(arch, get, facts)
    family = model_class(architecture_of(raw))
    config = family.read_config(HfConfig(raw, family.hf_defaults))
    # Norms hold what they multiply by.
    ends = _end_ids(get.values)
    rope = dataclasses.replace(config.rope, freq_factors=facts.freq_factors)
    return config.replace(norm_weight_offset=0.0, eos_token_ids=ends, dtype="bfloat16", rope=rope)


_Family = Callable[[Getter, Mapping[str, Any]], dict[str, Any]]


def _plain(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window = get.int("attention.sliding_window", 0)
    return {"sliding_windows": (window,) * fields["num_layers"]} if window else {}


def _llama(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(get, fields)
    if not get.int("expert_count", 0):
        return plain
    return {**plain, **_experts(get, fields), "architecture": "MixtralForCausalLM"}


def _olmo2(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = get.int("attention.sliding_window", 0), fields["num_layers"]
    if not window:
        return {}
    kinds = get.values.get(f"{get.prefix}attention.sliding_window_pattern")
    kinds = kinds if isinstance(kinds, list) else [(n + 1) % 4 != 0 for n in range(layers)]
    rope: RopeConfig = fields["rope"]
    return {
        "architecture": "Olmo3ForCausalLM",
        "sliding_windows": tuple(window if is_local else 0 for is_local in kinds),
        "local_rope": RopeConfig(theta=rope.theta, rot_dim=rope.rot_dim),
    }


def _qwen2(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _qwen3(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True}


def _experts(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    layers = fields["num_layers"]
    dense = get.int("leading_dense_block_count", 0)
    return {
        "num_experts": get.int("expert_count"),
        "num_experts_per_token": get.int("expert_used_count"),
        "moe_intermediate_size": get.int("expert_feed_forward_length", fields["intermediate_size"]),
        "num_shared_experts": get.int("expert_shared_count", 0),
        "routed_scale": get.float("expert_weights_scale", 1.0),
        "moe_layers": tuple(layer >= dense for layer in range(layers)),
    }


def _qwen2_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    size = get.int("expert_shared_feed_forward_length")
    return {**_experts(get, fields), "renormalize_experts": False, "shared_expert_size": size}


def _qwen3_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), "qk_norm": True}


def _gpt_oss(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window, rope = get.int("attention.sliding_window", 128), fields["rope"]
    return {
        **_experts(get, fields),
        "attention_sinks": True,
        "hidden_act": "swiglu_clamped",
        "sliding_windows": tuple(0 if n % 2 else window for n in range(fields["num_layers"])),
        # As the model was trained, which files do not say.
        "rope": dataclasses.replace(rope, scaling={**rope.scaling, "truncate": False}),
    }


def _interleaved(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"interleaved_rope": True}


def _glm4(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"interleaved_rope": True, "fused_mlp": True, "attention_out_bias": False}


def _glm(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    """ChatGLM's older files have queries, keys and values as one tensor, with biases."""
    is_fused = "attn_qkv" in fields["modules"]
    bias = ("attn_qkv" if is_fused else "attn_q") in fields["biases"]
    return {
        **_glm4(get, fields),
        "attention_bias": bias,
        "fused_projections": is_fused,
    }


def _glm4_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), "qk_norm": "attn_q_norm" in fields["modules"]}


def _lfm2(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    past = get.int("shortconv.l_cache", 3) - 1
    heads = of_layers(get, "attention.head_count_kv")
    return {
        "qk_norm": True,
        "layer_kinds": tuple("attention" if count else "state" for count in heads),
        "state": StateShape((fields["hidden_size"], past)),
    }


def _lfm2_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), **_lfm2(get, fields)}


def _ernie_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), "interleaved_rope": True}


def _olmoe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), "renormalize_experts": False}


def _cohere2(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = get.int("attention.sliding_window", 4096), fields["num_layers"]
    windows = tuple(0 if (n + 1) % 4 == 0 else window for n in range(layers))
    return {
        "interleaved_rope": True,
        "logit_scale": get.float("logit_scale"),
        "rms_norm_eps": float(f"{get.float('attention.layer_norm_epsilon', 1e-5):.6g}"),
        "rope_layers": tuple(size > 0 for size in windows),
        "sliding_windows": windows,
    }


def _granite(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_scale": get.float("attention.scale", 1.0),
        "embedding_scale": get.float("embedding_scale", 1.0),
        "residual_scale": get.float("residual_scale", 1.0),
        "logit_scale": 1.0 / get.float("logit_scale", 1.0),
    }


def _granite_moe(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_experts(get, fields), **_granite(get, fields)}


def _granite_hybrid(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    layers, size = fields["num_layers"], fields["intermediate_size"]
    heads = of_layers(get, "attention.head_count_kv")
    kinds = tuple("attention" if count else "state" for count in heads)
    rotates = bool(get.values.get(f"{get.prefix}rope.scaling.finetuned", False))
    experts = _experts(get, fields) if get.int("expert_count", 0) else {}
    mamba = _mamba(get, fields["hidden_size"])
    hf = HfConfig(mamba, {})
    return {
        **experts,
        **_granite(get, fields),
        "rope_layers": () if rotates else (False,) * layers,
        "shared_expert_size": get.int("expert_shared_feed_forward_length", size),
        "layer_kinds": kinds,
        "state": mamba_shape(hf, get.int("ssm.inner_size")).state if "state" in kinds else None,
        "raw": {**fields["raw"], **mamba},
    }


def _mamba(get: Getter, hidden_size: int) -> dict[str, Any]:
    """A config.json's keys of Mamba-2 mixers, which their families read beside the others."""
    return {
        "num_hidden_layers": get.int("block_count"),
        "mamba_n_heads": get.int("ssm.time_step_rank"),
        "mamba_n_groups": get.int("ssm.group_count", 1),
        "mamba_d_state": get.int("ssm.state_size"),
        "mamba_d_conv": get.int("ssm.conv_kernel", 4),
        "mamba_expand": get.int("ssm.inner_size") / hidden_size,
    }


def _phi3(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**_plain(get, fields), "fused_projections": True}


def _gemma(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    # Their norms hold 1 + weight: there is nothing to add.
    return {"hidden_act": "gelu_tanh", "embedding_scale": float(fields["hidden_size"] ** 0.5)}


def _gemma2(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = get.int("attention.sliding_window", 4096), fields["num_layers"]
    return {
        **_gemma(get, fields),
        "attention_scale": _gemma_scale(fields, largest=46),
        "attn_logit_softcap": get.float("attn_logit_softcapping", 50.0),
        "final_logit_softcap": get.float("final_logit_softcapping", 30.0),
        "sliding_windows": tuple(0 if layer % 2 else window for layer in range(layers)),
    }


def _gemma3(get: Getter, fields: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = get.int("attention.sliding_window", 1024), fields["num_layers"]
    return {
        **_gemma(get, fields),
        "qk_norm": True,
        "attention_scale": _gemma_scale(fields, largest=62),
        "final_logit_softcap": get.float("final_logit_softcapping", 0.0),
        "sliding_windows": tuple(0 if (n + 1) % 6 == 0 else window for n in range(layers)),
        "local_rope": RopeConfig(
            theta=get.float("rope.freq_base_swa", 10000.0), rot_dim=fields["head_dim"]
        ),
    }


def _gemma_scale(fields: Mapping[str, Any], largest: int) -> float:
    """The scale of scores, which files omit: 27B models, known by their layers, have another."""
    if fields["num_layers"] == largest:
        return float((fields["hidden_size"] / fields["num_heads"]) ** -0.5)
    return float(fields["head_dim"] ** -0.5)


# GGUF's architecture -> the one config.json would name, and its own fields. Mistral's files say
# that they are Llama's.
GGUF_ARCHITECTURES: dict[str, tuple[str, _Family]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gemma": ("GemmaForCausalLM", _gemma),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", _gemma3),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "cohere2": ("Cohere2ForCausalLM", _cohere2),
    "ernie4_5": ("Ernie4_5ForCausalLM", _interleaved),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM", _ernie_moe),
    "chatglm": ("GlmForCausalLM", _glm),
    "glm4": ("Glm4ForCausalLM", _glm4),
    "glm4moe": ("Glm4MoeForCausalLM", _glm4_moe),
    "gpt-oss": ("GptOssForCausalLM", _gpt_oss),
    "granite": ("GraniteForCausalLM", _granite),
    "granitehybrid": ("GraniteMoeHybridForCausalLM", _granite_hybrid),
    "granitemoe": ("GraniteMoeForCausalLM", _granite_moe),
    "hunyuan-dense": ("HunYuanDenseV1ForCausalLM", _qwen2),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", _experts),
    "lfm2": ("Lfm2ForCausalLM", _lfm2),
    "lfm2moe": ("Lfm2MoeForCausalLM", _lfm2_moe),
    "minimax-m2": ("MiniMaxM2ForCausalLM", _experts),
    "olmo2": ("Olmo2ForCausalLM", _olmo2),
    "olmoe": ("OlmoeForCausalLM", _olmoe),
    "qwen2moe": ("Qwen2MoeForCausalLM", _qwen2_moe),
    "qwen3moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
}


def _rope(get: Getter, head_dim: int, max_positions: int, facts: GgufFacts) -> RopeConfig:
    kind = get.values.get(f"{get.prefix}rope.scaling.type") or "none"
    factor = get.float("rope.scaling.factor", 1.0)
    original = get.int("rope.scaling.original_context_length", max_positions)
    rope_type, scaling = "default", dict[str, Any]()
    if facts.long_factors:
        rope_type = "longrope"
        scaling = {
            "short_factor": facts.short_factors,
            "long_factor": facts.long_factors,
            "original_max_position_embeddings": original,
            "attention_factor": get.float("rope.scaling.attn_factor", 1.0),
        }
    elif kind == "linear":
        rope_type, scaling = "linear", {"factor": factor}
    elif kind == "yarn":
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        rope_type = "yarn"
    elif kind != "none":
        raise ModelLoadError(f"GGUF: rope.scaling.type {kind!r} is not supported")
    return RopeConfig(
        theta=get.float("rope.freq_base", 10000.0),
        rot_dim=get.int("rope.dimension_count", head_dim),
        rope_type=rope_type,
        scaling=scaling,
        freq_factors=facts.freq_factors,
    )
