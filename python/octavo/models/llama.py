"""LlamaForCausalLM: RMSNorm, grouped-query attention with rope, SwiGLU.

Llama 2, 3, 3.1, 3.2, SmolLM2, Mistral, Qwen2, 2.5 and 3 are this model with other switches in
their ModelConfig. Layers are plain callables over the op set: there is no autograd, no hook, and
little Python between two ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.layers.attention import Attention
from octavo.layers.context import AttentionContext
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.ops import Ops
from octavo.layers.rope import cos_sin_table
from octavo.models.config import ModelConfig
from octavo.models.weights import Weights


class LlamaAttention:
    """Fused q, k, v projection, attention, output projection."""

    __slots__ = ("attention", "o_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: Ops
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
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
            q_norm=norms["q_norm"],
            k_norm=norms["k_norm"],
            eps=config.rms_norm_eps,
            sliding_window=config.sliding_window(layer),
            softcap=config.attn_logit_softcap,
        )

    def __call__(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x), ctx))


class LlamaMLP:
    """down(act(gate(x)) * up(x)), gate and up fused."""

    __slots__ = ("_gated_activation", "act", "down_proj", "gate_up_proj")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: Ops) -> None:
        prefix = f"model.layers.{layer}.mlp"
        d, f = config.hidden_size, config.intermediate_size
        gate_up = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up_proj = Linear(
            ops,
            [weights.matrix(f"{name}.weight", (f, d)) for name in gate_up],
            torch.cat([weights.vector(f"{name}.bias", f) for name in gate_up])
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


class LlamaDecoderLayer:
    """Attention and MLP; what each adds to the residual is added inside the next norm."""

    __slots__ = ("input_layernorm", "mlp", "post_attention_layernorm", "self_attn")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: Ops
    ) -> None:
        prefix = f"model.layers.{layer}"

        def norm(name: str) -> RMSNorm:
            weight = weights.vector(f"{prefix}.{name}.weight", config.hidden_size)
            return RMSNorm(ops, weight, config.rms_norm_eps)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = LlamaAttention(config, layer, cos_sin, weights, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = LlamaMLP(config, layer, weights, ops)

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


class LlamaForCausalLM:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

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
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(
            ops,
            weights.matrix("model.embed_tokens.weight", shape),
            weights.act_dtype,
            exact=weights.exact,
        )
        cos_sin = cos_sin_table(config.rope, config.max_position_embeddings, max_model_len, device)
        self.layers = [
            LlamaDecoderLayer(config, layer, cos_sin, weights, ops)
            for layer in range(config.num_layers)
        ]
        final = weights.vector("model.norm.weight", config.hidden_size)
        self.norm = RMSNorm(ops, final, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head = LMHead.tied(ops, self.embed_tokens, config.final_logit_softcap)
        else:
            head = ops.prepare_linear(weights.matrix("lm_head.weight", shape), exact=weights.exact)
            self.lm_head = LMHead(ops, head, config.final_logit_softcap)

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.self_attn.attention.k_cache = k_cache
            layer.self_attn.attention.v_cache = v_cache

    def __call__(self, input_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """input_ids int32 [T] -> hidden states [T, D] after the final norm."""
        x = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        assert residual is not None
        x, _ = self.norm.add(x, residual)
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        return self.lm_head(hidden)
