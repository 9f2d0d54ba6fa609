"""PhiForCausalLM, Phi-1, 1.5 and 2: attention and MLP side by side on one layer norm.

Every projection has a bias, the output head too; the rotary embedding turns part of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.layers.attention import Attention
from octavo.layers.context import AttentionContext
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm
from octavo.layers.ops import Ops
from octavo.models.config import ModelConfig
from octavo.models.errors import ModelLoadError
from octavo.models.hf_config import HfConfig
from octavo.models.llama import rope_tables
from octavo.models.weights import Weights


class PhiDecoderLayer:
    """x + attention(norm(x)) + mlp(norm(x))."""

    __slots__ = ("_activation", "act", "attention", "dense", "fc1", "fc2", "norm", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: Ops
    ) -> None:
        prefix = f"model.layers.{layer}"
        d, f = config.hidden_size, config.intermediate_size

        def linear(parts: Mapping[str, int], inputs: int) -> Linear:
            return Linear(
                ops,
                [weights.matrix(f"{prefix}.{p}.weight", (n, inputs)) for p, n in parts.items()],
                torch.cat([weights.vector(f"{prefix}.{p}.bias", n) for p, n in parts.items()]),
                exact=weights.exact,
            )

        self.norm = LayerNorm(
            ops,
            weights.vector(f"{prefix}.input_layernorm.weight", d),
            weights.vector(f"{prefix}.input_layernorm.bias", d),
            config.rms_norm_eps,
        )
        qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        self.qkv_proj = linear({f"self_attn.{name}": n for name, n in qkv.items()}, d)
        self.attention = Attention(
            ops,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
        )
        self.dense = linear({"self_attn.dense": d}, config.q_size)
        self.fc1 = linear({"mlp.fc1": f}, d)
        self.fc2 = linear({"mlp.fc2": d}, f)
        self._activation = ops.activation
        self.act = config.hidden_act

    def __call__(
        self, x: Tensor, residual: Tensor | None, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.norm(x), x
        else:
            x, residual = self.norm.add(x, residual)
        attended = self.dense(self.attention(self.qkv_proj(x), ctx))
        return attended + self.fc2(self._activation(self.fc1(x), self.act)), residual


class PhiForCausalLM:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        if hf.bool("qk_layernorm"):
            raise ModelLoadError("config.json: qk_layernorm is not supported")
        return hf.config(rms_norm_eps=hf.float("layer_norm_eps", 1e-5))

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
        self.layers = [
            PhiDecoderLayer(config, layer, table, weights, ops)
            for layer, table in enumerate(rope_tables(config, max_model_len, device))
        ]
        self.norm = LayerNorm(
            ops,
            weights.vector("model.final_layernorm.weight", config.hidden_size),
            weights.vector("model.final_layernorm.bias", config.hidden_size),
            config.rms_norm_eps,
        )
        head = (
            self.embed_tokens.weight
            if config.tie_word_embeddings
            else ops.prepare_linear(weights.matrix("lm_head.weight", shape), exact=weights.exact)
        )
        self.lm_head = LMHead(ops, head, bias=weights.vector("lm_head.bias", config.vocab_size))

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.attention.k_cache = k_cache
            layer.attention.v_cache = v_cache

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
