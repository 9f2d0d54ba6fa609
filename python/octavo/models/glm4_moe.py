"""Glm4MoeForCausalLM, GLM-4.5: experts chosen by sigmoids in groups, beside a shared one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)


class Glm4MoeDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts or, in the first layers, an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        return load_deepseek_experts(config, layer, weights, ops)


class Glm4MoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Glm4MoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            attention_bias=hf.bool("attention_bias"),
            qk_norm=hf.bool("use_qk_norm"),
            **deepseek_fields(hf),
        )


def deepseek_fields(hf: HfConfig) -> dict[str, Any]:
    """The experts of a config.json with DeepSeek's keys."""
    dense = hf.int("first_k_dense_replace", 1)
    step = hf.int("moe_layer_freq", 1)
    return {
        "num_experts": hf.int("n_routed_experts"),
        "num_experts_per_token": hf.int("num_experts_per_tok", 8),
        "moe_intermediate_size": hf.int("moe_intermediate_size"),
        "num_shared_experts": hf.int("n_shared_experts", 0),
        "renormalize_experts": bool(hf.values.get("norm_topk_prob", True)),
        "routed_scale": hf.float("routed_scaling_factor", 1.0),
        "expert_groups": (hf.int("n_group", 1), hf.int("topk_group", 1)),
        "moe_layers": tuple(layer >= dense and layer % step == 0 for layer in range(hf.num_layers)),
    }


def load_deepseek_experts(
    config: ModelConfig, layer: int, weights: Weights, ops: OpSet
) -> FeedForward:
    """Experts by sigmoids with a bias for the choice, in groups, beside the shared ones.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """
    prefix = f"model.layers.{layer}.mlp"
    name = f"{prefix}.gate.e_score_correction_bias"
    groups, top_groups = config.expert_groups
    routing = Routing(
        config.num_experts_per_token,
        config.renormalize_experts,
        is_sigmoid=True,
        bias=weights.vector(name, config.num_experts).float(),
        groups=groups,
        top_groups=top_groups,
        # As DeepSeek V3's own code: the best two of a group.
        group_scores=2,
        scale=config.routed_scale,
    )
    shared = None
    if config.num_shared_experts:
        size = config.num_shared_experts * config.moe_intermediate_size
        shared = LlamaMLP(config, layer, weights, ops, name="mlp.shared_experts", size=size)
    return load_experts(config, prefix, LLAMA_NAMES, weights, ops, routing=routing, shared=shared)
