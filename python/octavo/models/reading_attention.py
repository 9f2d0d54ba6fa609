"""ReadingAttention: attention whose later layers read the caches of earlier ones (Gemma 3n and 4).

Such a layer has queries alone. Values are normed, too, without a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.parts import heads_of, load_columns, load_rows


class ReadingAttention:
    """Projections, attention, output projection.

    ``has_values``: False where values are the keys before norm and rotation.
    """

    __slots__ = ("_has_values", "_v_norm", "attention", "o_proj", "qkv_proj")

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        cos_sin: Tensor,
        weights: Weights,
        ops: OpSet,
        *,
        has_values: bool = True,
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        keeps = config.kv_layers[layer]
        config = config.at_layer(layer)
        d, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads = heads_of(config, ops.rank)
        names = ["q", "k", "v"][: 1 if not keeps else 3 if has_values else 2]
        sizes = (config.q_size, config.kv_size, config.kv_size)
        rows = {f"{prefix}.{name}_proj": size for name, size in zip(names, sizes, strict=False)}
        ranges = (heads.q_rows, heads.kv_rows, heads.kv_rows)[: len(names)]
        self.qkv_proj = load_columns(rows, d, bias, weights, ops, ranges)
        self.o_proj = load_rows(
            f"{prefix}.o_proj",
            d,
            config.q_size,
            config.attention_out_bias,
            weights,
            ops,
            heads.q_rows,
        )
        self._has_values = has_values
        self._v_norm: RMSNorm | None = None
        k_norm: Tensor | None = None
        if keeps:
            k_norm = weights.vector(f"{prefix}.k_norm.weight", dim)
            self._v_norm = RMSNorm(ops, torch.ones_like(k_norm), config.rms_norm_eps)
        num_heads, num_kv_heads = heads.counts
        self.attention = Attention(
            ops,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads if keeps else 0,
            head_dim=dim,
            cos_sin=cos_sin,
            scale=config.attention_scale,
            q_norm=weights.vector(f"{prefix}.q_norm.weight", dim),
            k_norm=k_norm,
            eps=config.rms_norm_eps,
            sliding_window=config.sliding_window(layer),
        )

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        qkv = self.qkv_proj(x)
        if self._v_norm is not None:
            attention = self.attention
            width = attention.num_kv_heads * attention.head_dim
            values = qkv[:, -width:].contiguous().view(-1, attention.head_dim)
            values = self._v_norm(values).view(-1, width)
            keys = qkv[:, :-width] if self._has_values else qkv
            qkv = torch.cat((keys, values), 1)
        return self.o_proj(self.attention(qkv, ctx))


def kv_sources(types: Sequence[str], num_shared: int) -> tuple[int, ...]:
    """``ModelConfig.kv_sources``: the last layers read those of their type before them.

    Raises:
        ModelLoadError: there is none before them.
    """
    if num_shared == 0:
        return ()
    first = len(types) - num_shared
    last = {kind: layer for layer, kind in enumerate(types[: max(first, 0)])}
    if missing := set(types) - set(last):
        raise ModelLoadError(
            f"config.json: num_kv_shared_layers {num_shared} leaves no layer of type "
            f"{min(missing)!r} with keys and values of its own"
        )
    return (*range(first), *(last[kind] for kind in types[first:]))
