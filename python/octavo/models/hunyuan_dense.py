"""HunYuanDenseV1ForCausalLM: Llama that norms each head's query and key after their rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.rope import RopeConfig
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class HunYuanAttention(LlamaAttention):
    """Norms after rotation.

    A rotation keeps a head's size, so that the division comes before it; and the two weights meet
    in the product of query and key, so that the query takes both.
    """

    __slots__ = ()

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        prefix = f"model.layers.{layer}.self_attn"
        query, key = (
            weights.vector(f"{prefix}.{name}_layernorm.weight", config.head_dim)
            for name in ("query", "key")
        )
        self.attention.q_norm = self.attention.k_norm = torch.ones_like(query)
        self.attention.set_q_factor(query.float() * key.float())


class HunYuanDecoderLayer(LlamaDecoderLayer):
    """See LlamaDecoderLayer."""

    __slots__ = ()

    attention_class = HunYuanAttention


class HunYuanDenseV1ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}
    layer_class: ClassVar[Callable[..., DecoderLayer]] = HunYuanDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        return hf.config(attention_bias=bias, attention_out_bias=bias, rope=hunyuan_rope(hf))


def hunyuan_rope(hf: HfConfig) -> RopeConfig:
    """The rotary embedding; "dynamic" with an alpha is another base, at all lengths."""
    rope = hf.rope()
    alpha = rope.scaling.get("alpha")
    if rope.rope_type != "dynamic" or not alpha:
        return rope
    theta = rope.theta * float(alpha) ** (rope.rot_dim / (rope.rot_dim - 2))
    return RopeConfig(theta=theta, rot_dim=rope.rot_dim)
