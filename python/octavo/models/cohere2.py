"""Cohere2ForCausalLM: attention and MLP side by side on one norm, and rope in local layers alone.

The norm is a LayerNorm without bias, and rope turns neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, LayerNorm
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaAttention, LlamaForCausalLM, LlamaMLP


class Cohere2DecoderLayer:
    """Attention and MLP of the same norm."""

    __slots__ = ("input_layernorm", "mlp", "self_attn")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}.input_layernorm"
        self.input_layernorm = Cohere2ForCausalLM.make_norm(prefix, config, weights, ops)
        self.self_attn = LlamaAttention(config, layer, cos_sin, weights, ops)
        self.mlp = LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        return self.self_attn(x, ctx) + self.mlp(x), residual

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Cohere2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Cohere2DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        pattern = hf.int("sliding_window_pattern", 4)
        types = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(hf.num_layers)
        ]
        windows = hf.windows(default_types=types)
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            interleaved_rope=True,
            logit_scale=hf.float("logit_scale"),
            rms_norm_eps=hf.float("layer_norm_eps"),
            rope_layers=tuple(window > 0 for window in windows),
            sliding_windows=windows,
        )

    @staticmethod
    def make_norm(prefix: str, config: ModelConfig, weights: Weights, ops: OpSet) -> LayerNorm:
        weight = weights.vector(f"{prefix}.weight", config.hidden_size)
        return LayerNorm(ops, weight, None, config.rms_norm_eps)
