"""Gemma4ForCausalLM, the text model: global layers with heads of another size than local ones.

A global layer's values may be its keys, later layers may read the caches of earlier ones, experts
may stand beside the MLP, and layers may have vectors of their own for each token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.layers.context import StepContext
from octavo.layers.norm import RMSNorm
from octavo.models.config import KVShape, ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.gemma import gemma_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM, LlamaMLP
from octavo.models.parts import layer_norms
from octavo.models.per_layer_input import PerLayerEmbedding, PerLayerGate, of_layers
from octavo.models.reading_attention import ReadingAttention, kv_sources
from octavo.models.stage import Stage

_DEFAULTS: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 262144,
}


class Gemma4Experts:
    """Experts beside an MLP; the router and they see the residual through norms of their own."""

    __slots__ = ("_experts", "_pre_norm", "_router_norm")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix, d = f"model.layers.{layer}", config.hidden_size
        scale = weights.vector(f"{prefix}.router.scale", d).float() * d**-0.5
        self._router_norm = RMSNorm(ops, scale.to(weights.act_dtype), config.rms_norm_eps)
        self._pre_norm = layer_norms(config, layer, weights, ops)("pre_feedforward_layernorm_2")
        per_expert = weights.vector(f"{prefix}.router.per_expert_scale", config.num_experts)
        routing = Routing(config.num_experts_per_token, expert_scales=per_expert.float())
        self._experts = load_experts(
            config, prefix, LLAMA_NAMES, weights, ops, router="router.proj", routing=routing
        )

    def __call__(self, residual: Tensor) -> Tensor:
        """residual [T, D] -> [T, D]."""
        routed_by = self._router_norm(residual)
        return self._experts(self._pre_norm(residual), routed_by)


class Gemma4DecoderLayer:
    """Attention and MLP, each between two norms, then the layer's vectors."""

    __slots__ = (
        "_scale",
        "experts",
        "experts_norm",
        "gate",
        "input_layernorm",
        "mlp",
        "mlp_norm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "self_attn",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf = HfConfig(config.raw, _DEFAULTS)
        norm = layer_norms(config, layer, weights, ops)
        has_values = not hf.bool("attention_k_eq_v") or config.sliding_window(layer) > 0
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = ReadingAttention(
            config, layer, cos_sin, weights, ops, has_values=has_values
        )
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        is_wide = hf.bool("use_double_wide_mlp") and not config.kv_layers[layer]
        size = config.intermediate_size * (2 if is_wide else 1)
        self.mlp = LlamaMLP(config, layer, weights, ops, size=size)
        self.experts: Gemma4Experts | None = None
        if config.num_experts:
            self.experts = Gemma4Experts(config, layer, weights, ops)
            self.mlp_norm = norm("post_feedforward_layernorm_1")
            self.experts_norm = norm("post_feedforward_layernorm_2")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self.gate = PerLayerGate(config, layer, weights, ops) if config.per_layer_size else None
        self._scale = weights.vector(f"model.layers.{layer}.layer_scalar", 1)

    def __call__(self, residual: Tensor, vectors: Tensor | None, ctx: StepContext) -> Tensor:
        """residual [T, D], the layer's vectors [T, size] or None -> [T, D]."""
        x = self.self_attn(self.input_layernorm(residual), ctx)
        residual = residual + self.post_attention_layernorm(x)
        x = self.mlp(self.pre_feedforward_layernorm(residual))
        if self.experts is not None:
            x = self.mlp_norm(x) + self.experts_norm(self.experts(residual))
        residual = residual + self.post_feedforward_layernorm(x)
        if self.gate is not None and vectors is not None:
            residual = residual + self.gate(residual, vectors)
        return residual * self._scale

    def spec(self) -> None:
        """None: no op set runs such layers in one call."""
        return None


class Gemma4ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., Any]] = Gemma4DecoderLayer

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: OpSet,
        *,
        max_model_len: int,
        device: torch.device,
        stage: Stage | None = None,
    ) -> None:
        super().__init__(
            config, weights, ops, max_model_len=max_model_len, device=device, stage=stage
        )
        self.per_layer: PerLayerEmbedding | None = None
        if config.per_layer_size and self.stage.is_first:
            self.per_layer = PerLayerEmbedding(config, weights, ops)

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        if hf.values.get("use_bidirectional_attention") == "all":
            raise ModelLoadError("config.json: use_bidirectional_attention 'all' is not supported")
        types = list(
            hf.values.get("layer_types")
            or [
                "sliding_attention" if (n + 1) % 6 else "full_attention"
                for n in range(hf.num_layers)
            ]
        )
        types[-1] = "full_attention"
        shapes = tuple(_kv_shape(hf, layer, kind) for layer, kind in enumerate(types))
        rope = dataclasses.replace(hf.rope("full_attention"), rot_dim=shapes[-1].head_dim)
        has_experts = hf.bool("enable_moe_block")
        return hf.config(
            **{**gemma_fields(hf), "norm_weight_offset": 0.0},
            qk_norm=True,
            attention_scale=1.0,
            per_layer_size=hf.int("hidden_size_per_layer_input"),
            per_layer_vocab=hf.int("vocab_size_per_layer_input"),
            final_logit_softcap=hf.float("final_logit_softcapping", 0.0),
            sliding_windows=tuple(
                hf.int("sliding_window") if kind == "sliding_attention" else 0 for kind in types
            ),
            rope=rope,
            local_rope=hf.rope("sliding_attention"),
            head_dim=shapes[-1].head_dim,
            num_kv_heads=shapes[-1].num_heads,
            kv_shapes=shapes,
            kv_sources=kv_sources(types, hf.int("num_kv_shared_layers")),
            num_experts=hf.int("num_experts") if has_experts else 0,
            num_experts_per_token=hf.int("top_k_experts") if has_experts else 0,
            moe_intermediate_size=hf.int("moe_intermediate_size") if has_experts else 0,
        )

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """As LlamaForCausalLM's; behind a stage's states go the vectors of all layers, if any."""
        stage, d, size = self.stage, self.config.hidden_size, self.config.per_layer_size
        vectors: Tensor | None = None
        if stage.is_first:
            residual = self.embed_tokens(inputs)
            if self.per_layer is not None:
                vectors = self.per_layer(inputs, residual)
        else:
            residual = inputs[:, :d].contiguous()
            vectors = inputs[:, d:].contiguous() if size else None
        own: Tensor | list[None] = [None] * len(stage.layers)
        if vectors is not None:
            own = of_layers(vectors, stage.layers, size)
        layers = cast(Sequence[Gemma4DecoderLayer], self.layers)
        for layer, vector in zip(layers, own, strict=True):
            residual = layer(residual, vector, ctx)
        if not stage.is_last:
            return residual if vectors is None else torch.cat((residual, vectors), 1)
        assert isinstance(self.norm, RMSNorm)
        return self.norm(residual)


class Gemma4UnifiedForCausalLM(Gemma4ForCausalLM):
    """Without vectors of layers. See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        **_DEFAULTS,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
    }


def _kv_shape(hf: HfConfig, layer: int, kind: str) -> KVShape:
    """A layer's heads: releases have keys of global layers, transformers writes a layer's own."""
    num_heads, head_dim = hf.int("num_key_value_heads"), hf.int("head_dim")
    own = (hf.values.get("per_layer_config") or {}).get(str(layer))
    if own is not None:
        return KVShape(
            int(own.get("num_key_value_heads", num_heads)), int(own.get("head_dim", head_dim))
        )
    if kind != "full_attention" or "per_layer_config" in hf.values:
        return KVShape(num_heads, head_dim)
    if hf.bool("attention_k_eq_v"):
        num_heads = hf.int("num_global_key_value_heads", num_heads)
    return KVShape(num_heads, hf.int("global_head_dim", 512))
