"""LlamaForCausalLM: RMSNorm, grouped-query attention with rope, SwiGLU.

Llama 2, 3, 3.1, 3.2 and SmolLM2; most other families are this model with other switches in their
ModelConfig, or with another decoder layer. Layers are plain callables over the op set:
there is no autograd, no hook, and little Python between two ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.decoder import Decoder, DecoderSpec, LayerSpec
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Rows, Weight
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, LayerNorm, RMSNorm, added
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.parts import (
    heads_of,
    layer_norms,
    load_columns,
    load_head,
    load_rows,
    load_vocabulary,
    part_config,
    rope_tables,
    width_of,
)
from octavo.models.stage import Stage, whole

# A weight and its bias, as ``kernels.decoder`` takes them.
Projection: TypeAlias = tuple[Weight, Tensor | None]


class LlamaAttention:
    """Fused q, k, v projection, attention, output projection."""

    __slots__ = ("attention", "o_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        d, q, kv = config.hidden_size, config.q_size, config.kv_size
        heads = heads_of(config, ops.rank)
        qkv: dict[str, int | list[int]]
        qkv = {f"{prefix}.q_proj": q, f"{prefix}.k_proj": kv, f"{prefix}.v_proj": kv}
        if config.fused_projections:
            qkv = {f"{prefix}.qkv_proj": [q, kv, kv]}
        ranges = (heads.q_rows, heads.kv_rows, heads.kv_rows)
        self.qkv_proj = load_columns(qkv, d, config.attention_bias, weights, ops, ranges)
        self.o_proj = load_rows(
            f"{prefix}.o_proj", d, q, config.attention_out_bias, weights, ops, heads.q_rows
        )
        num_heads, num_kv_heads = heads.counts
        norms: dict[str, Tensor | None] = {"q_norm": None, "k_norm": None}
        if config.qk_norm:
            norms = {n: weights.vector(f"{prefix}.{n}.weight", config.head_dim) for n in norms}
        sinks = None
        if config.attention_sinks:
            part = Rows((heads.q,)) if ops.rank.size > 1 else None
            sinks = weights.vector(f"{prefix}.sinks", config.num_heads, part).float()
        kv_scales = weights.kv_scales(prefix, config.num_kv_heads)
        if kv_scales is not None:
            kv_scales = kv_scales[:, slice(*heads.kv)].contiguous()
        self.attention = Attention(
            ops,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
            scale=config.attention_scale,
            q_norm=norms["q_norm"],
            k_norm=norms["k_norm"],
            eps=config.rms_norm_eps,
            weight_offset=config.norm_weight_offset,
            sliding_window=config.sliding_window(layer),
            softcap=config.attn_logit_softcap,
            interleaved=config.interleaved_rope,
            sinks=sinks,
            kv_scales=kv_scales,
        )

    def attend(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        """The projection qkv -> what the output projection takes; may write into qkv."""
        return self.attention(qkv, ctx)

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.o_proj(self.attend(self.qkv_proj(x), ctx))

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        qkv, residual = self.qkv_proj.normed(x, residual, norm)
        return self.o_proj.add(self.attend(qkv, ctx), residual)


class LlamaMLP:
    """down(act(gate(x)) * up(x)), gate and up fused."""

    __slots__ = ("_gated_activation", "act", "down_proj", "gate_up_proj")

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        ops: OpSet,
        *,
        name: str = "mlp",
        size: int | None = None,
    ) -> None:
        """``name``: below the layer; ``size``: of what gate and up project to."""
        prefix = f"model.layers.{layer}.{name}"
        d, f, bias = config.hidden_size, size or config.intermediate_size, config.mlp_bias
        own = width_of(f, ops.rank)
        parts: dict[str, int | list[int]] = {f"{prefix}.gate_proj": f, f"{prefix}.up_proj": f}
        if config.fused_projections or config.fused_mlp:
            parts = {f"{prefix}.gate_up_proj": [f, f]}
        self.gate_up_proj = load_columns(parts, d, bias, weights, ops, (own, own))
        self.down_proj = load_rows(f"{prefix}.down_proj", d, f, bias, weights, ops, own)
        self._gated_activation = ops.gated_activation
        self.act = config.hidden_act

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.down_proj(self._gated_activation(self.gate_up_proj(x), self.act))

    def normed(self, x: Addend, residual: Tensor, norm: RMSNorm) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        hidden, residual = self.gate_up_proj.normed(x, residual, norm, self.act)
        return self.down_proj.add(hidden, residual)

    def spec(self) -> tuple[Projection, Projection]:
        """Gate and up, and down, as ``kernels.decoder`` takes them."""
        return self.gate_up_proj.spec(), self.down_proj.spec()


class FeedForward(Protocol):
    """A block's second half: an MLP, or experts."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def normed(self, x: Addend, residual: Tensor, norm: RMSNorm) -> tuple[Addend, Tensor]: ...

    def spec(self) -> tuple[Projection, Projection] | None: ...


class LlamaDecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    __slots__ = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")

    attention_class: ClassVar[Callable[..., Any]] = LlamaAttention

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = self.attention_class(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = self.make_mlp(config, layer, weights, ops)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        """The block's second half."""
        return LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.self_attn.normed(x, residual, self.input_layernorm, ctx)
        return self.mlp.normed(x, residual, self.post_attention_layernorm)

    def spec(self) -> LayerSpec | None:
        """This layer for an op set that runs all of them in one call.

        None with what none has there: experts, sinks, rope of neighbours, another attention or one
        in both directions.
        """
        mlp = self.mlp.spec()
        if mlp is None or self.attention_class is not LlamaAttention:
            return None
        attention = self.self_attn.attention
        if attention.sinks is not None or attention.interleaved or not attention.causal:
            return None
        return LayerSpec(
            input_norm=self.input_layernorm.spec.weight,
            post_norm=self.post_attention_layernorm.spec.weight,
            qkv=self.self_attn.qkv_proj.spec(),
            o=self.self_attn.o_proj.spec(),
            gate_up=mlp[0],
            down=mlp[1],
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            kv_scales=attention.kv_scales,
            k_cache=attention.k_cache,
            v_cache=attention.v_cache,
            sliding_window=attention.sliding_window,
        )


class DecoderLayer(Protocol):
    """One block: takes and returns (addend, residual), both [T, D].

    The addend is None where there is nothing to add, as before the first layer. A residual that is
    passed in may be overwritten.
    """

    self_attn: Any

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]: ...

    def spec(self) -> LayerSpec | None:
        """This layer as ``kernels.decoder`` describes one; None if it is of another build."""


class LlamaForCausalLM:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    A look-alike overrides ``read_config``, ``layer_class``, or ``hf_defaults``: what its
    config.json may leave out.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    hf_defaults: ClassVar[Mapping[str, Any]] = {}
    other_parts: ClassVar[tuple[str, ...]] = ()
    layer_class: ClassVar[Callable[..., DecoderLayer]] = LlamaDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        bias = hf.bool("attention_bias")
        return hf.config(attention_bias=bias, attention_out_bias=bias, mlp_bias=hf.bool("mlp_bias"))

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
        self.stage = stage = stage or whole(config)
        self.config = part_config(config, ops.rank, stage)
        self.num_weights = 0
        self._ops = ops
        self._decoder: Decoder | None = None
        # In the activations' type, as it was in training.
        scale = torch.tensor(config.embedding_scale, dtype=weights.act_dtype).item()
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = load_vocabulary("model.embed_tokens", config, weights, ops, scale)
        tables = rope_tables(config, max_model_len, device)
        self.layers = [
            self.layer_class(config, layer, tables[layer], weights, ops) for layer in stage.layers
        ]
        if not stage.is_last:
            return
        self.norm = self.make_norm("model.norm", config, weights, ops)
        tied = self.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = load_head(
            tied,
            config,
            weights,
            ops,
            softcap=config.final_logit_softcap,
            scale=config.logit_scale,
        )

    @staticmethod
    def make_norm(
        prefix: str, config: ModelConfig, weights: Weights, ops: OpSet
    ) -> RMSNorm | LayerNorm:
        """The norm before the output head."""
        weight = weights.vector(f"{prefix}.weight", config.hidden_size)
        return RMSNorm(ops, weight, config.rms_norm_eps, config.norm_weight_offset)

    def attend_in_both_directions(self) -> None:
        """Every token of a text sees all of it: for vectors, of texts that a step holds whole."""
        for layer in self.layers:
            layer.self_attn.attention.causal = False

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, index in zip(self.layers, self.config.cache_indices, strict=True):
            attention = layer.self_attn.attention
            attention.k_cache, attention.v_cache = caches[index]
        self._decoder = self._make_decoder()

    def _make_decoder(self) -> Decoder | None:
        """All layers in one call, where the op set has that for such layers."""
        make = self._ops.make_decoder
        if make is None or self._ops.rank.size > 1 or self.stage.count > 1:
            # Ranks meet between layers, and the call of all of them ends in the final norm.
            return None
        layers = []
        attention = self.layers[0].self_attn.attention
        for layer in self.layers:
            spec = layer.spec()
            if spec is None or layer.self_attn.attention.cos_sin is not attention.cos_sin:
                return None
            layers.append(spec)
        assert isinstance(self.norm, RMSNorm)
        return make(
            DecoderSpec(
                layers=layers,
                final_norm=self.norm.spec.weight,
                cos_sin=attention.cos_sin,
                num_heads=attention.num_heads,
                eps=self.config.rms_norm_eps,
                scale=attention.scale,
                softcap=attention.softcap,
                act=self.config.hidden_act,
                weight_offset=self.config.norm_weight_offset,
            )
        )

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """Token ids int32 [T], or states [T, D] of the stage before -> hidden states [T, D].

        Those of the last stage have gone through the final norm.
        """
        residual = self.embed_tokens(inputs) if self.stage.is_first else inputs
        if self._decoder is not None:
            return self._decoder(residual, ctx)
        x: Addend = None
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        if not self.stage.is_last:
            return added(x, residual, self._ops.rank)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        return self.lm_head(hidden)
