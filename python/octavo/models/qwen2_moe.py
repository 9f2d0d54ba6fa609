"""Qwen2MoeForCausalLM: Qwen2 with experts beside a shared one that a sigmoid weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, GatedShared, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)


class Qwen2MoeDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts or an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        prefix = f"model.layers.{layer}.mlp"
        size = config.shared_expert_size
        mlp = LlamaMLP(config, layer, weights, ops, name="mlp.shared_expert", size=size)
        gate = f"{prefix}.shared_expert_gate"
        shared = GatedShared(gate, mlp, config.hidden_size, weights, ops)
        return load_experts(config, prefix, LLAMA_NAMES, weights, ops, shared=shared)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "sliding_window": 4096,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Qwen2MoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        step, dense = hf.int("decoder_sparse_step"), hf.values["mlp_only_layers"]
        until = hf.int("max_window_layers", hf.num_layers)
        types = [
            "full_attention" if layer % 2 or layer >= until else "sliding_attention"
            for layer in range(hf.num_layers)
        ]
        return hf.config(
            attention_bias=hf.bool("qkv_bias"),
            sliding_windows=hf.windows(default_types=types)
            if hf.bool("use_sliding_window")
            else (),
            num_experts=hf.int("num_experts", 60),
            num_experts_per_token=hf.int("num_experts_per_tok", 4),
            moe_intermediate_size=hf.int("moe_intermediate_size", 1408),
            shared_expert_size=hf.int("shared_expert_intermediate_size", 5632),
            renormalize_experts=hf.bool("norm_topk_prob"),
            moe_layers=tuple(
                layer not in dense and (layer + 1) % step == 0 for layer in range(hf.num_layers)
            ),
        )
