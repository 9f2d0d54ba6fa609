"""OlmoeForCausalLM: Llama with experts, and with norms over all heads' queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, FeedForward, LlamaDecoderLayer, LlamaForCausalLM
from octavo.models.olmo2 import Olmo2Attention


class OlmoeDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts."""

    __slots__ = ()

    attention_class = Olmo2Attention

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        return load_experts(config, f"model.layers.{layer}.mlp", LLAMA_NAMES, weights, ops)


class OlmoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = OlmoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        if hf.values.get("clip_qkv") is not None:
            raise ModelLoadError("config.json: clip_qkv is not supported")
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            num_experts=hf.int("num_experts", 64),
            num_experts_per_token=hf.int("num_experts_per_tok", 8),
            moe_intermediate_size=hf.int("intermediate_size"),
            renormalize_experts=hf.bool("norm_topk_prob"),
        )
