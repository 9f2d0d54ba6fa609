"""MiniMaxM2ForCausalLM: experts chosen by sigmoids, and norms over all heads' queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.models.config import ModelConfig
from octavo.models.experts import load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, FeedForward, LlamaDecoderLayer, LlamaForCausalLM
from octavo.models.olmo2 import Olmo2Attention


class MiniMaxM2DecoderLayer(LlamaDecoderLayer):
    """Attention, then experts."""

    __slots__ = ()

    attention_class = Olmo2Attention

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        bias = weights.vector(f"{prefix}.e_score_correction_bias", config.num_experts).float()
        routing = Routing(config.num_experts_per_token, is_sigmoid=True, bias=bias)
        return load_experts(config, prefix, ("w1", "w3", "w2"), weights, ops, routing=routing)


class MiniMaxM2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5000000.0,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = MiniMaxM2DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        part: dict[str, Any] = {}
        if (rotary_dim := hf.values.get("rotary_dim")) is not None:
            part = {"partial_rotary_factor": int(rotary_dim) / hf.head_dim}
        return hf.config(
            rope=hf.rope(**part),
            num_experts=hf.int("num_local_experts", hf.int("num_experts", 256)),
            num_experts_per_token=hf.int("num_experts_per_tok", 8),
            moe_intermediate_size=hf.int("intermediate_size"),
        )
