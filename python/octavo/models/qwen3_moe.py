"""Qwen3MoeForCausalLM: Qwen3 with a mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
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


class Qwen3MoeDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts or an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        prefix = f"model.layers.{layer}.mlp"
        return load_experts(config, prefix, LLAMA_NAMES, weights, ops)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Qwen3MoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        step, dense = hf.int("decoder_sparse_step"), hf.values["mlp_only_layers"]
        num_experts = hf.int("num_experts", hf.int("num_local_experts", 128))
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            qk_norm=True,
            sliding_windows=hf.windows() if hf.bool("use_sliding_window") else (),
            num_experts=num_experts,
            num_experts_per_token=hf.int("num_experts_per_tok", 8),
            moe_intermediate_size=hf.int("moe_intermediate_size", 768),
            renormalize_experts=hf.bool("norm_topk_prob"),
            moe_layers=tuple(
                num_experts > 0 and layer not in dense and (layer + 1) % step == 0
                for layer in range(hf.num_layers)
            ),
        )
