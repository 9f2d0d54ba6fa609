"""LayerNormDecoder: embedding, layers, a final LayerNorm and a head, for Phi, Falcon and others.

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
from octavo.layers.norm import Addend, added
from octavo.models.config import ModelConfig
from octavo.models.parts import (
    heads_of,
    load_columns,
    load_head,
    load_layer_norm,
    load_rows,
    load_vocabulary,
    part_config,
    rope_tables,
    width_of,
)
from octavo.models.stage import Stage, whole


class Layer(Protocol):
    """One block: takes and returns (addend, residual), both [T, D]; no addend at first."""

    attention: Attention

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]: ...


class LayerNormDecoder:
    """The decoder. Weights are pulled from ``weights`` while it is built, layer by layer.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """

    other_parts: ClassVar[tuple[str, ...]] = ()
    layer_class: ClassVar[Callable[..., Layer]]
    embedding_name: ClassVar[str] = "model.embed_tokens"
    norm_name: ClassVar[str]
    norm_bias: ClassVar[bool] = True
    head_bias: ClassVar[bool] = False
    # A LayerNorm of the embedding's rows, and learned positions that are added to them.
    embedding_norm_name: ClassVar[str] = ""
    positions_name: ClassVar[str] = ""

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
        self._rank = ops.rank
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = load_vocabulary(self.embedding_name, config, weights, ops)
        self._embedding_norm = self._positions = None
        if stage.is_first and self.embedding_norm_name:
            self._embedding_norm = load_layer_norm(self.embedding_norm_name, config, weights, ops)
        if stage.is_first and self.positions_name:
            shape = (config.max_position_embeddings, config.hidden_size)
            self._positions = ops.weight([weights.embedding(self.positions_name, shape)])
        tables = rope_tables(config, max_model_len, device)
        self.layers = [
            self.layer_class(config, layer, tables[layer], weights, ops) for layer in stage.layers
        ]
        if not stage.is_last:
            return
        self.norm = load_layer_norm(self.norm_name, config, weights, ops, has_bias=self.norm_bias)
        tied = self.embed_tokens.weight if config.tie_word_embeddings else None
        self.lm_head = load_head(tied, config, weights, ops, has_bias=self.head_bias)

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hand each layer its keys and values."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.attention.k_cache = k_cache
            layer.attention.v_cache = v_cache

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """Token ids int32 [T], or states [T, D] of the stage before -> hidden states [T, D].

        Those of the last stage have gone through the final norm.
        """
        residual = self._embed(inputs, ctx) if self.stage.is_first else inputs
        x: Addend = None
        for layer in self.layers:
            x, residual = layer(x, residual, ctx)
        if not self.stage.is_last:
            return added(x, residual, self._rank)
        return self.norm.add(x, residual)[0]

    def _embed(self, ids: Tensor, ctx: StepContext) -> Tensor:
        states = self.embed_tokens(ids)
        if self._positions is not None:
            states = states + self._positions.rows(ctx.positions, out_dtype=states.dtype)
        return states if self._embedding_norm is None else self._embedding_norm(states)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        return self.lm_head(hidden)


def make_attention(
    config: ModelConfig,
    cos_sin: Tensor,
    ops: OpSet,
    *,
    sliding_window: int = 0,
    slopes: Tensor | None = None,
) -> Attention:
    """Attention over the rank's heads, without norms. ``slopes``: [num_heads] of all ranks."""
    heads = heads_of(config, ops.rank)
    num_heads, num_kv_heads = heads.counts
    if slopes is not None:
        slopes = slopes[slice(*heads.q)].to(cos_sin.device)
    return Attention(
        ops,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.head_dim,
        cos_sin=cos_sin,
        scale=config.attention_scale,
        sliding_window=sliding_window,
        slopes=slopes,
    )


def alibi_slopes(num_heads: int) -> Tensor:
    """float32 [num_heads]: how far a token's score falls for each token of distance.

    A geometric series for a power of two of heads; others take every other term of the next one's
    (arXiv 2108.12409, and its authors' code).
    """
    power = 1 << (num_heads.bit_length() - 1)

    def series(count: int) -> Tensor:
        return 2.0 ** (-8.0 * torch.arange(1, count + 1, dtype=torch.float64) / count)

    between = series(2 * power)[0::2][: num_heads - power]
    return torch.cat((series(power), between)).float()


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
