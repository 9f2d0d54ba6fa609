"""FalconForCausalLM: attention and MLP side by side, one fused projection, rope, no gate.

Falcon 7B has one KV head and one norm a block, 40B, 180B and 11B ("new decoder architecture")
grouped heads and one or two; falcon-rw has ALiBi in place of rope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Range, Rows, reordered
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.layer_norm_decoder import (
    Layer,
    LayerNormDecoder,
    UngatedMLP,
    alibi_slopes,
    make_attention,
)
from octavo.models.parts import Heads, heads_of, load_columns, load_layer_norm, load_rows


def _rows_in_order(config: ModelConfig, num_heads: int, num_kv_heads: int) -> Tensor:
    """Rows of the fused projection as q, k, v; the file has each KV head's queries, key, value."""
    group = num_heads // num_kv_heads
    rows = torch.arange((num_heads + 2 * num_kv_heads) * config.head_dim)
    heads = rows.view(num_kv_heads, group + 2, config.head_dim)
    return torch.cat([part.reshape(-1) for part in heads.split_with_sizes([group, 1, 1], dim=1)])


def load_fused_qkv(prefix: str, config: ModelConfig, weights: Weights, ops: OpSet) -> Linear:
    """A projection whose rows are each KV head's queries, its key and its value.

    GGUF files have all queries, then all keys, then all values.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    whole = config.q_size + 2 * config.kv_size
    if config.raw.get("stacks_qkv"):
        heads = heads_of(config, ops.rank)
        stacked: dict[str, int | list[int]] = {
            prefix: [config.q_size, config.kv_size, config.kv_size]
        }
        ranges = (heads.q_rows, heads.kv_rows, heads.kv_rows)
        return load_columns(
            stacked, config.hidden_size, config.attention_bias, weights, ops, ranges
        )
    order = _rows_in_order(config, *heads_of(config, ops.rank).counts)
    part = None
    if ops.rank.size > 1:
        part = Rows(_fused_rows(config, heads_of(config, ops.rank)))
    weight = weights.linear(prefix, (whole, config.hidden_size), part)
    bias = None
    if config.attention_bias:
        bias = weights.vector(f"{prefix}.bias", whole, part)
        bias = bias[order.to(bias.device)]
    return Linear(ops, [reordered(weight, order)], bias)


def _fused_rows(config: ModelConfig, heads: Heads) -> tuple[Range, ...]:
    """A rank's rows of the fused projection, as many query heads of each of its KV heads."""
    group, dim = config.num_heads // config.num_kv_heads, config.head_dim
    ranges: list[Range] = []
    for kv in range(*heads.kv):
        first = kv * (group + 2) * dim
        # Of a KV head that several ranks hold, each has some of the queries.
        begin = max(heads.q[0] - kv * group, 0) * dim
        end = min(heads.q[1] - kv * group, group) * dim
        ranges += [
            (first + begin, first + end),
            (first + group * dim, first + (group + 2) * dim),
        ]
    return tuple(ranges)


class FalconDecoderLayer:
    """Attention and MLP side by side, on one norm or on one each; or one after the other."""

    __slots__ = (
        "attention",
        "dense",
        "mlp",
        "mlp_norm",
        "norm",
        "parallel",
        "qkv",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"transformer.h.{layer}"
        d, bias = config.hidden_size, config.mlp_bias
        new = bool(config.raw.get("new_decoder_architecture"))
        self.parallel = new or bool(config.raw.get("parallel_attn", True))
        names = ["input_layernorm"]
        if not self.parallel:
            names = ["input_layernorm", "post_attention_layernorm"]
        elif new and config.raw.get("num_ln_in_parallel_attn") in (None, 2):
            names = ["ln_attn", "ln_mlp"]
        norms = [load_layer_norm(f"{prefix}.{name}", config, weights, ops) for name in names]
        self.norm, self.mlp_norm = norms[0], norms[1] if len(norms) == 2 else None
        self.qkv = load_fused_qkv(f"{prefix}.self_attention.query_key_value", config, weights, ops)
        slopes = None
        if config.raw.get("alibi"):
            # Added before the scores are scaled; and rounded, as the model was trained.
            slopes = alibi_slopes(config.num_heads).bfloat16().float() * config.head_dim**-0.5
        self.attention = make_attention(config, cos_sin, ops, slopes=slopes)
        dense, own = f"{prefix}.self_attention.dense", heads_of(config, ops.rank).q_rows
        self.dense = load_rows(dense, d, config.q_size, bias, weights, ops, own)
        mlp = (f"{prefix}.mlp.dense_h_to_4h", f"{prefix}.mlp.dense_4h_to_h")
        self.mlp = UngatedMLP(mlp, config, bias, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm.add(x, residual)
        attended = self.dense(self.attention(self.qkv(x), ctx))
        if not self.parallel:
            assert self.mlp_norm is not None
            x, residual = self.mlp_norm.add(attended, residual)
            return self.mlp(x), residual
        if self.mlp_norm is not None:
            x = self.mlp_norm(residual)
        return attended + self.mlp(x), residual


class FalconForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "activation": "gelu",
        "multi_query": True,
        "tie_word_embeddings": True,
    }
    layer_class: ClassVar[Callable[..., Layer]] = FalconDecoderLayer
    embedding_name: ClassVar[str] = "transformer.word_embeddings"
    norm_name: ClassVar[str] = "transformer.ln_f"

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        num_kv_heads = hf.int("num_attention_heads")
        if hf.bool("new_decoder_architecture"):
            num_kv_heads = hf.int("num_kv_heads", num_kv_heads)
        elif hf.bool("multi_query"):
            num_kv_heads = 1
        bias = hf.bool("bias")
        return hf.config(
            intermediate_size=hf.int("ffn_hidden_size", 4 * hf.int("hidden_size")),
            num_kv_heads=num_kv_heads,
            hidden_act=hf.values["activation"],
            attention_bias=bias,
            attention_out_bias=bias,
            mlp_bias=bias,
            rms_norm_eps=hf.float("layer_norm_epsilon", 1e-5),
            rope_layers=(False,) * hf.num_layers if hf.bool("alibi") else (),
        )
