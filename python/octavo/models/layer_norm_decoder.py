"""LayerNormDecoder: embedding, layers, a final LayerNorm and a head, for Phi, Falcon and StableLM.

What they share beside: every layer is called with what the one before adds to the residual, and
adds it inside its own norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.layers.attention import Attention
from octavo.layers.context import AttentionContext
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm
from octavo.layers.ops import Ops
from octavo.models.config import ModelConfig
from octavo.models.llama import rope_tables


class Layer(Protocol):
    """One block: takes and returns (what it adds, residual), both [T, D]; no residual at first."""

    attention: Attention

    def __call__(
        self, x: Tensor, residual: Tensor | None, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]: ...


class LayerNormDecoder:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    layer_class: ClassVar[Callable[..., Layer]]
    embedding_name: ClassVar[str] = "model.embed_tokens"
    norm_name: ClassVar[str]
    head_bias: ClassVar[bool] = False

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
            weights.matrix(f"{self.embedding_name}.weight", shape),
            weights.act_dtype,
            exact=weights.exact,
        )
        self.layers = [
            self.layer_class(config, layer, table, weights, ops)
            for layer, table in enumerate(rope_tables(config, max_model_len, device))
        ]
        self.norm = load_norm(self.norm_name, config, weights, ops)
        head = (
            self.embed_tokens.weight
            if config.tie_word_embeddings
            else ops.prepare_linear(weights.matrix("lm_head.weight", shape), exact=weights.exact)
        )
        bias = weights.vector("lm_head.bias", config.vocab_size) if self.head_bias else None
        self.lm_head = LMHead(ops, head, bias=bias)

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


def load_norm(name: str, config: ModelConfig, weights: Weights, ops: Ops) -> LayerNorm:
    """The LayerNorm [D] with a bias that the checkpoint calls ``name``."""
    weight = weights.vector(f"{name}.weight", config.hidden_size)
    bias = weights.vector(f"{name}.bias", config.hidden_size)
    return LayerNorm(ops, weight, bias, config.rms_norm_eps)


def load_linear(
    parts: Mapping[str, int], inputs: int, bias: bool, weights: Weights, ops: Ops
) -> Linear:
    """One projection of ``inputs`` values, its rows stacked from ``parts``: name -> rows."""
    biases = [weights.vector(f"{name}.bias", rows) for name, rows in parts.items() if bias]
    return Linear(
        ops,
        [weights.matrix(f"{name}.weight", (rows, inputs)) for name, rows in parts.items()],
        torch.cat(biases) if biases else None,
        exact=weights.exact,
    )


def make_attention(config: ModelConfig, cos_sin: Tensor, ops: Ops) -> Attention:
    """Attention over the config's heads, without windows or norms."""
    return Attention(
        ops,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        cos_sin=cos_sin,
    )
