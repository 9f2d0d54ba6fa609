"""Glm4ForCausalLM: norms before and after each block, and half of a head rotated, by neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaDecoderLayer, LlamaForCausalLM
from octavo.models.parts import layer_norms


class Glm4DecoderLayer(LlamaDecoderLayer):
    """Attention and MLP, each between two norms."""

    __slots__ = ("post_mlp_layernorm", "post_self_attn_layernorm")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        norm = layer_norms(config, layer, weights, ops)
        self.post_self_attn_layernorm = norm("post_self_attn_layernorm")
        self.post_mlp_layernorm = norm("post_mlp_layernorm")

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.post_self_attn_layernorm(self.self_attn(x, ctx))
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.post_mlp_layernorm(self.mlp(x)), residual

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Glm4ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "attention_bias": True,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-07,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Glm4DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            attention_bias=hf.bool("attention_bias"),
            fused_mlp=True,
            interleaved_rope=True,
        )
