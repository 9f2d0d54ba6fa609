"""Ministral3ForCausalLM: Mistral whose queries grow with their position, in steps of a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class Ministral3Attention(LlamaAttention):
    """Attention of queries that are multiplied by a factor of their position."""

    __slots__ = ("_beta", "_every", "_q_size")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        self._beta, self._every = config.query_growth or (0.0, 1.0)
        self._q_size = self.attention.num_heads * config.head_dim

    def attend(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        factor = 1 + self._beta * torch.log1p(torch.floor(ctx.positions / self._every))
        qkv[:, : self._q_size] *= factor[:, None].to(qkv.dtype)
        return self.attention(qkv, ctx)


class Ministral3DecoderLayer(LlamaDecoderLayer):
    """See LlamaDecoderLayer."""

    __slots__ = ()

    attention_class = Ministral3Attention


class Ministral3ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Ministral3DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        rope = hf.rope()
        scaling = dict(rope.scaling)
        beta = float(scaling.pop("llama_4_scaling_beta", None) or 0.0)
        every = float(scaling.get("original_max_position_embeddings") or hf.max_positions)
        return hf.config(sliding_windows=hf.windows(), rope=rope, query_growth=(beta, every))
