"""Olmo2ForCausalLM: Llama with norms after each block and none before it.

Queries and keys are normed over all heads together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, RMSNorm, added, normed_part
from octavo.models.config import ModelConfig
from octavo.models.llama import (
    DecoderLayer,
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
)
from octavo.models.parts import heads_of, layer_norms


class Olmo2Attention(LlamaAttention):
    """Norms the whole query and the whole key, then attends."""

    __slots__ = ("_copies", "_kv_rows", "_q_rows", "_rank", "k_norm", "q_norm", "sizes")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        prefix = f"model.layers.{layer}.self_attn"
        q_norm = weights.vector(f"{prefix}.q_norm.weight", config.q_size)
        k_norm = weights.vector(f"{prefix}.k_norm.weight", config.kv_size)
        self.q_norm = RMSNorm(ops, q_norm, config.rms_norm_eps)
        self.k_norm = RMSNorm(ops, k_norm, config.rms_norm_eps)
        heads, rank = heads_of(config, ops.rank), ops.rank
        self.sizes = heads.sizes
        self._rank = rank
        self._q_rows, self._kv_rows = heads.q_rows, heads.kv_rows
        # Ranks that hold the same key-value head.
        self._copies = max(rank.size // config.num_kv_heads, 1)

    def attend(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        q, k, v = qkv.split_with_sizes(self.sizes, dim=1)
        q, k = q.contiguous(), k.contiguous()
        q = normed_part(q, self.q_norm, self._q_rows, self._rank)
        k = normed_part(k, self.k_norm, self._kv_rows, self._rank, copies=self._copies)
        return self.attention(torch.cat((q, k, v), dim=1), ctx)


class Olmo2DecoderLayer:
    """Attention and MLP on the residual itself; what they add is normed."""

    __slots__ = (
        "_rank",
        "mlp",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        self._rank = ops.rank
        norm = layer_norms(config, layer, weights, ops)
        self.self_attn = Olmo2Attention(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = LlamaMLP(config, layer, weights, ops)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        residual = added(x, residual, self._rank)
        residual = residual + self.post_attention_layernorm(self.self_attn(residual, ctx))
        return self.post_feedforward_layernorm(self.mlp(residual)), residual

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Olmo2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    layer_class: ClassVar[Callable[..., DecoderLayer]] = Olmo2DecoderLayer
