"""MixtralForCausalLM: Mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.experts import load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)


class MixtralDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        return load_experts(config, prefix, ("w1", "w3", "w2"), weights, ops)


class MixtralForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5}
    layer_class: ClassVar[Callable[..., DecoderLayer]] = MixtralDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            sliding_windows=hf.windows(),
            num_experts=hf.int("num_local_experts", 8),
            num_experts_per_token=hf.int("num_experts_per_tok", 2),
            moe_intermediate_size=hf.int("intermediate_size"),
        )
