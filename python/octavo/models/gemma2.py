"""Gemma2ForCausalLM: Gemma with norms after blocks too, softcaps, and every other layer local."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.gemma import gemma_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
)
from octavo.models.parts import layer_norms


class Gemma2DecoderLayer:
    """Attention and MLP, each between two norms."""

    __slots__ = (
        "input_layernorm",
        "mlp",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "self_attn",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = LlamaAttention(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = LlamaMLP(config, layer, weights, ops)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, ctx))
        x, residual = self.pre_feedforward_layernorm.add(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Gemma2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Gemma2DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        every_other = ["sliding_attention", "full_attention"] * (-(-hf.num_layers // 2))
        return hf.config(
            **gemma_fields(hf),
            attention_scale=hf.float("query_pre_attn_scalar") ** -0.5,
            # An explicit null is none, an absent one what the release had.
            attn_logit_softcap=float(hf.raw.get("attn_logit_softcapping", 50.0) or 0.0),
            final_logit_softcap=float(hf.raw.get("final_logit_softcapping", 30.0) or 0.0),
            sliding_windows=hf.windows(default_types=every_other),
        )
