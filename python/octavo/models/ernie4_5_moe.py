"""Ernie4_5_MoeForCausalLM: Ernie 4.5 with experts beside shared ones, in a range of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.models.config import ModelConfig
from octavo.models.ernie4_5 import Ernie4_5ForCausalLM, ernie_fields
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)


class ErnieMoeDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts or an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        prefix = f"model.layers.{layer}.mlp"
        name = f"{prefix}.moe_statics.e_score_correction_bias"
        bias = weights.tensor(name, (1, config.num_experts))[0].float()
        shared = None
        if config.num_shared_experts:
            size = config.num_shared_experts * config.moe_intermediate_size
            shared = LlamaMLP(config, layer, weights, ops, name="mlp.shared_experts", size=size)
        routing = Routing(config.num_experts_per_token, bias=bias)
        return load_experts(
            config, prefix, LLAMA_NAMES, weights, ops, routing=routing, shared=shared
        )


class Ernie4_5_MoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = Ernie4_5ForCausalLM.hf_defaults
    layer_class: ClassVar[Callable[..., DecoderLayer]] = ErnieMoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        fields = ernie_fields(hf)
        if fields["mlp_bias"]:
            raise ModelLoadError("config.json: use_bias with experts is not supported")
        begin, end = hf.int("moe_layer_start_index", 1), hf.int("moe_layer_end_index", -1)
        step = hf.int("moe_layer_interval", 1)
        last = hf.num_layers - 1 if end == -1 else end
        return hf.config(
            **fields,
            num_experts=hf.int("moe_num_experts", 64),
            num_experts_per_token=hf.int("moe_k", 6),
            moe_intermediate_size=hf.int("moe_intermediate_size", 1536),
            num_shared_experts=hf.int("moe_num_shared_experts", 0),
            moe_layers=tuple(
                begin <= layer <= last and (layer + 1) % step == 0 for layer in range(hf.num_layers)
            ),
        )
