"""GraniteForCausalLM: Llama with factors on embeddings, scores, residual additions and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaDecoderLayer, LlamaForCausalLM


class GraniteDecoderLayer(LlamaDecoderLayer):
    """Scales what attention and MLP add to the residual."""

    __slots__ = ("scale",)

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        self.scale = config.residual_scale

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, ctx) * self.scale
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x) * self.scale, residual

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class GraniteForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    layer_class: ClassVar[Callable[..., DecoderLayer]] = GraniteDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**granite_fields(hf), mlp_bias=hf.bool("mlp_bias"))


def granite_fields(hf: HfConfig) -> dict[str, Any]:
    """Fields that the dense models and those with experts share."""
    bias = hf.bool("attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "embedding_scale": hf.float("embedding_multiplier", 1.0),
        "attention_scale": hf.float("attention_multiplier", 1.0),
        "residual_scale": hf.float("residual_multiplier", 1.0),
        "logit_scale": 1.0 / hf.float("logits_scaling", 1.0),
    }
