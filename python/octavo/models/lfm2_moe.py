"""Lfm2MoeForCausalLM: LFM2 with experts chosen by sigmoids in all but the first layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.models.config import ModelConfig
from octavo.models.experts import load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.lfm2 import Lfm2DecoderLayer, Lfm2ForCausalLM, lfm2_fields
from octavo.models.llama import FeedForward, LlamaMLP

# Added to a sum of sigmoids before it divides, as the trained model's code does.
_LEAST_SUM = 1e-6


class Lfm2MoeDecoderLayer(Lfm2DecoderLayer):
    """A convolution or attention, then experts or, in the first layers, an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        prefix = f"model.layers.{layer}.feed_forward"
        bias = None
        if config.raw.get("use_expert_bias", True):
            bias = weights.vector(f"{prefix}.expert_bias", config.num_experts).float()
        routing = Routing(
            config.num_experts_per_token,
            config.renormalize_experts,
            is_sigmoid=True,
            bias=bias,
            scale=config.routed_scale,
            least_sum=_LEAST_SUM,
        )
        return load_experts(config, prefix, ("w1", "w3", "w2"), weights, ops, routing=routing)


class Lfm2MoeForCausalLM(Lfm2ForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "conv_L_cache": 3,
        "norm_eps": 1e-5,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    layer_class: ClassVar[Callable[..., Any]] = Lfm2MoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        dense = hf.int("num_dense_layers", 2)
        return hf.config(
            **lfm2_fields(hf),
            num_experts=hf.int("num_experts", 32),
            num_experts_per_token=hf.int("num_experts_per_tok", 4),
            moe_intermediate_size=hf.int("moe_intermediate_size", 1792),
            moe_layers=tuple(layer >= dense for layer in range(hf.num_layers)),
            renormalize_experts=hf.bool("norm_topk_prob"),
            routed_scale=hf.float("routed_scaling_factor", 1.0),
        )
