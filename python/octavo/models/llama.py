"""LlamaForCausalLM: RMSNorm, grouped-query attention with rope, SwiGLU.

Llama 2, 3, 3.1, 3.2 and SmolLM2 as they are; most other families are this model with other switches
in their ModelConfig, or with another decoder layer. Layers are plain callables over the op set:
there is no autograd, no hook, and little Python between two ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.decoder import Decoder, DecoderSpec, LayerSpec
from octavo.layers.attention import Attention
from octavo.layers.context import AttentionContext
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.ops import Ops, has_fused_ops, make_decoder
from octavo.layers.rope import RopeConfig, cos_sin_table, identity_table
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig

# A norm fused into the projection behind it is computed again by every program of it. Up to this
# size that costs less than the launch it saves (on an H100, gate and up of one row: 4.3 against 6.6
# us for a 135M model, 26.9 against 27.2 for 1B, but 84.8 against 81.0 for 8B).
MAX_FUSED_HIDDEN = 2048


class LlamaAttention:
    """Fused q, k, v projection, attention, output projection."""

    __slots__ = ("attention", "o_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: Ops
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        if config.fused_projections:
            rows = {"qkv_proj": sum(rows.values())}
        self.qkv_proj = Linear(
            ops,
            [
                weights.matrix(f"{prefix}.{name}.weight", (n, config.hidden_size))
                for name, n in rows.items()
            ],
            torch.cat([weights.vector(f"{prefix}.{name}.bias", n) for name, n in rows.items()])
            if config.attention_bias
            else None,
            exact=weights.exact,
        )
        self.o_proj = Linear(
            ops,
            [weights.matrix(f"{prefix}.o_proj.weight", (config.hidden_size, config.q_size))],
            weights.vector(f"{prefix}.o_proj.bias", config.hidden_size)
            if config.attention_out_bias
            else None,
            exact=weights.exact,
        )
        norms: dict[str, Tensor | None] = {"q_norm": None, "k_norm": None}
        if config.qk_norm:
            norms = {n: weights.vector(f"{prefix}.{n}.weight", config.head_dim) for n in norms}
        self.attention = Attention(
            ops,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
            scale=config.attention_scale,
            q_norm=norms["q_norm"],
            k_norm=norms["k_norm"],
            eps=config.rms_norm_eps,
            weight_offset=config.norm_weight_offset,
            sliding_window=config.sliding_window(layer),
            softcap=config.attn_logit_softcap,
        )

    def __call__(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x), ctx))

    def fused(self, x: Tensor, norm: RMSNorm, ctx: AttentionContext) -> Tensor:
        """x + attention(norm(x)), in x's memory."""
        return self.o_proj.add(self.attention(self.qkv_proj.normed(x, norm), ctx), x)


class LlamaMLP:
    """down(act(gate(x)) * up(x)), gate and up fused."""

    __slots__ = ("_gated_activation", "act", "down_proj", "gate_up_proj")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: Ops) -> None:
        prefix = f"model.layers.{layer}.mlp"
        d, f = config.hidden_size, config.intermediate_size
        rows = {"gate_proj": f, "up_proj": f}
        if config.fused_projections:
            rows = {"gate_up_proj": 2 * f}
        self.gate_up_proj = Linear(
            ops,
            [weights.matrix(f"{prefix}.{name}.weight", (n, d)) for name, n in rows.items()],
            torch.cat([weights.vector(f"{prefix}.{name}.bias", n) for name, n in rows.items()])
            if config.mlp_bias
            else None,
            exact=weights.exact,
        )
        self.down_proj = Linear(
            ops,
            [weights.matrix(f"{prefix}.down_proj.weight", (d, f))],
            weights.vector(f"{prefix}.down_proj.bias", d) if config.mlp_bias else None,
            exact=weights.exact,
        )
        self._gated_activation = ops.gated_activation
        self.act = config.hidden_act

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self._gated_activation(self.gate_up_proj(x), self.act))

    def fused(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)), in x's memory."""
        return self.down_proj.add(self.gate_up_proj.normed_gated(x, norm, self.act), x)


def layer_norms(
    config: ModelConfig, layer: int, weights: Weights, ops: Ops
) -> Callable[[str], RMSNorm]:
    """Makes the norms [D] of one layer, by name."""

    def norm(name: str) -> RMSNorm:
        weight = weights.vector(f"model.layers.{layer}.{name}.weight", config.hidden_size)
        return RMSNorm(ops, weight, config.rms_norm_eps, config.norm_weight_offset)

    return norm


def rope_tables(config: ModelConfig, max_model_len: int, device: torch.device) -> list[Tensor]:
    """Each layer's cosines and sines, float32 [max_model_len, rot]; equal ones are one tensor."""

    def table(rope: RopeConfig) -> Tensor:
        return cos_sin_table(rope, config.max_position_embeddings, max_model_len, device)

    shared = table(config.rope)
    local = shared if config.local_rope is None else table(config.local_rope)
    none = shared if all(config.rope_layers) else identity_table(max_model_len, device)
    return [
        none
        if config.rope_layers and not config.rope_layers[layer]
        else (local if config.sliding_window(layer) else shared)
        for layer in range(config.num_layers)
    ]


class LlamaDecoderLayer:
    """Attention and MLP; what each adds to the residual is added inside the next norm."""

    __slots__ = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: Ops
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = LlamaAttention(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = self.make_mlp(config, layer, weights, ops)

    @staticmethod
    def make_mlp(
        config: ModelConfig, layer: int, weights: Weights, ops: Ops
    ) -> Callable[[Tensor], Tensor]:
        """What follows attention: [T, D] -> [T, D]."""
        return LlamaMLP(config, layer, weights, ops)

    def __call__(
        self, x: Tensor, residual: Tensor | None, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            # No copy of x is needed: ops never write their input, and attention returns a new one.
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual

    def fused(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """One layer on the residual stream itself, in three fewer kernels."""
        x = self.self_attn.fused(x, self.input_layernorm, ctx)
        return cast(LlamaMLP, self.mlp).fused(x, self.post_attention_layernorm)

    def spec(self) -> LayerSpec:
        """The same, said to an op set that runs all layers in one call. Only with LlamaMLP."""
        attention, mlp = self.self_attn.attention, cast(LlamaMLP, self.mlp)
        return LayerSpec(
            input_norm=self.input_layernorm.weight,
            post_norm=self.post_attention_layernorm.weight,
            qkv=self.self_attn.qkv_proj.spec(),
            o=self.self_attn.o_proj.spec(),
            gate_up=mlp.gate_up_proj.spec(),
            down=mlp.down_proj.spec(),
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            k_cache=attention.k_cache,
            v_cache=attention.v_cache,
            sliding_window=attention.sliding_window,
        )


class DecoderLayer(Protocol):
    """One block: takes and returns (what it adds, residual), both [T, D]; no residual at first."""

    self_attn: Any

    def __call__(
        self, x: Tensor, residual: Tensor | None, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]: ...


class LlamaForCausalLM:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    A look-alike overrides ``read_config``, ``layer_class``, or ``hf_defaults``: what its
    config.json may leave out.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    hf_defaults: ClassVar[Mapping[str, Any]] = {}
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
        ops: Ops,
        *,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self._ops = ops
        self._decoder: Decoder | None = None
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(
            ops,
            weights.matrix("model.embed_tokens.weight", shape),
            weights.act_dtype,
            # In the activations' type, as it was in training.
            torch.tensor(config.embedding_scale, dtype=weights.act_dtype).item(),
            exact=weights.exact,
        )
        tables = rope_tables(config, max_model_len, device)
        self.layers = [
            self.layer_class(config, layer, table, weights, ops)
            for layer, table in enumerate(tables)
        ]
        # Blocks of another build keep their own order of norms and sums.
        plain = all(type(layer) is LlamaDecoderLayer for layer in self.layers)
        fits = config.hidden_size <= MAX_FUSED_HIDDEN and not config.mlp_bias
        self._fuses_one_row = plain and fits and has_fused_ops(ops)
        final = weights.vector("model.norm.weight", config.hidden_size)
        self.norm = RMSNorm(ops, final, config.rms_norm_eps, config.norm_weight_offset)
        head = (
            self.embed_tokens.weight
            if config.tie_word_embeddings
            else ops.prepare_linear(weights.matrix("lm_head.weight", shape), exact=weights.exact)
        )
        self.lm_head = LMHead(ops, head, config.final_logit_softcap, scale=config.logit_scale)

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.self_attn.attention.k_cache = k_cache
            layer.self_attn.attention.v_cache = v_cache
        self._decoder = self._make_decoder()

    def _make_decoder(self) -> Decoder | None:
        """All layers in one call, where they are this file's and the op set offers it."""
        layers = []
        attention = self.layers[0].self_attn.attention
        for layer in self.layers:
            if type(layer) is not LlamaDecoderLayer or type(layer.mlp) is not LlamaMLP:
                return None
            if layer.self_attn.attention.cos_sin is not attention.cos_sin:
                return None
            layers.append(layer.spec())
        spec = DecoderSpec(
            layers=layers,
            final_norm=self.norm.weight,
            cos_sin=attention.cos_sin,
            num_heads=attention.num_heads,
            eps=self.config.rms_norm_eps,
            scale=attention.scale,
            softcap=attention.softcap,
            act=self.config.hidden_act,
            weight_offset=self.config.norm_weight_offset,
        )
        return make_decoder(self._ops, spec)

    def __call__(self, input_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """input_ids int32 [T] -> hidden states [T, D] after the final norm."""
        x = self.embed_tokens(input_ids)
        if self._fuses_one_row and x.shape[0] == 1:
            for plain in cast(Sequence[LlamaDecoderLayer], self.layers):
                x = plain.fused(x, ctx)
            return self.norm(x)
        if self._decoder is not None:
            return self._decoder(x, ctx)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        assert residual is not None
        x, _ = self.norm.add(x, residual)
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        return self.lm_head(hidden)
