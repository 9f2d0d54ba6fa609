"""LayerNormDecoder: embedding, layers, a final LayerNorm and a head, for Phi, Falcon and StableLM.

Every layer is called with what the one before adds to the residual, and adds it inside its own
norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.models.config import ModelConfig
from octavo.models.parts import (
    load_columns,
    load_head,
    load_layer_norm,
    load_rows,
    load_vocabulary,
    part_config,
    rope_tables,
    width_of,
)


class Layer(Protocol):
    """One block: takes and returns (addend, residual), both [T, D]; no addend at first."""

    attention: Attention

    def __call__(
        self, x: Tensor | None, residual: Tensor, ctx: StepContext
    ) -> tuple[Tensor | None, Tensor]: ...


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
        ops: OpSet,
        *,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.config = part_config(config, ops.rank)
        self.num_weights = 0
        self.embed_tokens = load_vocabulary(self.embedding_name, config, weights, ops)
        self.layers = [
            self.layer_class(config, layer, table, weights, ops)
            for layer, table in enumerate(rope_tables(config, max_model_len, device))
        ]
        self.norm = load_layer_norm(self.norm_name, config, weights, ops)
        self.lm_head = load_head(self.embed_tokens, config, weights, ops, has_bias=self.head_bias)

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.attention.k_cache = k_cache
            layer.attention.v_cache = v_cache

    def __call__(self, input_ids: Tensor, ctx: StepContext) -> Tensor:
        """input_ids int32 [T] -> hidden states [T, D] after the final norm."""
        x: Tensor | None = None
        residual = self.embed_tokens(input_ids)
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        return self.lm_head(hidden)


def make_attention(config: ModelConfig, cos_sin: Tensor, ops: OpSet) -> Attention:
    """Attention over the rank's heads, without windows or norms."""
    own = part_config(config, ops.rank)
    return Attention(
        ops,
        num_heads=own.num_heads,
        num_kv_heads=own.num_kv_heads,
        head_dim=config.head_dim,
        cos_sin=cos_sin,
    )


class UngatedMLP:
    """down(act(up(x)))."""

    __slots__ = ("_activation", "act", "down", "up")

    def __init__(
        self,
        names: tuple[str, str],
        config: ModelConfig,
        bias: bool,
        weights: Weights,
        ops: OpSet,
    ) -> None:
        """``names``: the prefixes of the two projections; ``bias``: both have one."""
        d, f = config.hidden_size, config.intermediate_size
        own = width_of(f, ops.rank)
        self.up = load_columns({names[0]: f}, d, bias, weights, ops, [own])
        self.down = load_rows(names[1], d, f, bias, weights, ops, own)
        self._activation = ops.activation
        self.act = config.hidden_act

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.down(self._activation(self.up(x), self.act))
