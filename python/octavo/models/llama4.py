"""Llama4ForCausalLM, the text model: attention in chunks, or to everything without rope.

A router's sigmoids multiply what its experts are given, not what they return, and a shared expert
stands beside them; a step of layers between has a plain MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.layers.context import StepContext
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)

_DEFAULTS: Mapping[str, Any] = {
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "head_dim": 128,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 131072,
    "no_rope_layer_interval": 4,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_qk_norm": True,
}


class Llama4Attention(LlamaAttention):
    """Attention with norms without weights where there is rope, and growing queries elsewhere."""

    __slots__ = ("_growth", "_q_size")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        attention, hf = self.attention, HfConfig(config.raw, _DEFAULTS)
        self._growth = None
        if config.rope_layers[layer]:
            if hf.bool("use_qk_norm"):
                # Releases norm after the rotation, which keeps a head's size.
                ones = torch.ones(config.head_dim, dtype=weights.act_dtype, device=cos_sin.device)
                attention.q_norm = attention.k_norm = ones
        elif hf.bool("attn_temperature_tuning"):
            self._growth = config.query_growth
        self._q_size = attention.num_heads * config.head_dim
        # A context of one chunk is seen whole.
        attention.set_chunked(0 < config.attention_chunks[layer] < cos_sin.shape[0])

    def attend(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        if self._growth is not None:
            scale, every = self._growth
            factor = 1 + scale * torch.log1p(torch.floor((ctx.positions + 1) / every))
            qkv[:, : self._q_size] *= factor[:, None].to(qkv.dtype)
        return self.attention(qkv, ctx)


class Llama4DecoderLayer(LlamaDecoderLayer):
    """Attention, then experts beside a shared one, or an MLP."""

    __slots__ = ()

    attention_class = Llama4Attention

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops, name="feed_forward")
        size = config.moe_intermediate_size
        name = "feed_forward.shared_expert"
        return load_experts(
            config,
            f"model.layers.{layer}.feed_forward",
            LLAMA_NAMES,
            weights,
            ops,
            router="router",
            routing=Routing(
                config.num_experts_per_token, False, is_sigmoid=True, weighs_inputs=True
            ),
            shared=LlamaMLP(config, layer, weights, ops, name=name, size=size),
        )


class Llama4ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., DecoderLayer]] = Llama4DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias, count = hf.bool("attention_bias"), hf.num_layers
        interval, step = hf.int("no_rope_layer_interval"), hf.int("interleave_moe_layer_step")
        rope_layers = hf.values.get("no_rope_layers") or [
            (layer + 1) % interval != 0 for layer in range(count)
        ]
        # An explicit null is none.
        chunk = hf.int("attention_chunk_size") if hf.raw.get("attention_chunk_size", 1) else 0
        types = hf.values.get("layer_types") or [
            "chunked_attention" if has_rope and chunk else "full_attention"
            for has_rope in rope_layers
        ]
        experts = hf.values.get("moe_layers")
        if experts is None:
            experts = range(step - 1, count, step)
        return hf.config(
            intermediate_size=hf.int("intermediate_size_mlp"),
            attention_bias=bias,
            attention_out_bias=bias,
            interleaved_rope=True,
            rope_layers=tuple(bool(has_rope) for has_rope in rope_layers[:count]),
            attention_chunks=tuple(
                chunk if kind == "chunked_attention" else 0 for kind in types[:count]
            ),
            query_growth=(hf.float("attn_scale"), hf.float("floor_scale")),
            num_experts=hf.int("num_local_experts"),
            num_experts_per_token=hf.int("num_experts_per_tok"),
            moe_intermediate_size=hf.int("intermediate_size"),
            moe_layers=tuple(layer in experts for layer in range(count)),
        )

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See LlamaForCausalLM.

        Raises:
            ModelLoadError: chunks of attention are not whole blocks.
        """
        super().bind_kv_cache(caches)
        size, block_size = max(self.config.attention_chunks), caches[0][0].shape[2]
        if self._is_chunked and size % block_size:
            raise ModelLoadError(
                f"config.json: attention_chunk_size {size} is not a multiple of block_size "
                f"{block_size}"
            )

    @property
    def _is_chunked(self) -> bool:
        return any(layer.self_attn.attention.is_chunked for layer in self.layers)

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """See LlamaForCausalLM."""
        if self._is_chunked:
            block_size = self.layers[0].self_attn.attention.k_cache.shape[2]
            chunks = ctx.in_chunks(max(self.config.attention_chunks), block_size)
            ctx = dataclasses.replace(ctx, chunks=chunks)
        return super().__call__(inputs, ctx)
