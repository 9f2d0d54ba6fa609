"""Qwen3NextForCausalLM: the gated delta rule in most layers, gated attention in some, experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Part, Range, Rows, part_of
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.gated_delta import (
    DeltaHeads,
    DeltaInputs,
    DeltaShape,
    GatedDeltaNet,
    delta_shape,
)
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM, layer_kinds
from octavo.models.llama import FeedForward, LlamaMLP
from octavo.models.mixed_layer import MixedDecoderLayer
from octavo.models.parts import heads_of, load_rows, scaled
from octavo.models.qwen2_moe import Qwen2MoeDecoderLayer

KINDS = {"linear_attention": "state", "full_attention": "attention"}


def every_fourth(hf: HfConfig) -> list[str]:
    """``layer_types``; without them each fourth layer has attention, or as the file says."""
    interval = hf.int("full_attention_interval", 4)
    types: list[str] | None = hf.values.get("layer_types")
    return types or [
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(hf.num_layers)
    ]


class GatedAttention:
    """Attention with head norms, its result times the sigmoid of a gate."""

    __slots__ = ("_qkv_size", "attention", "o_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        d, q, kv, size = config.hidden_size, config.q_size, config.kv_size, config.head_dim
        heads = heads_of(config, ops.rank)
        own_q, own_kv = scaled(heads.q, 2 * size), heads.kv_rows

        def part(rows: Range) -> Rows | None:
            return Rows((rows,)) if ops.rank.size > 1 else None

        # The file has each head's query followed by its gate.
        both = weights.linear(f"{prefix}.q_proj", (2 * q, d), part(own_q))
        halves = [
            Rows(tuple((i * size, (i + 1) * size) for i in range(first, 2 * heads.counts[0], 2)))
            for first in (0, 1)
        ]
        keys, values = (
            weights.linear(f"{prefix}.{n}", (kv, d), part(own_kv)) for n in ("k_proj", "v_proj")
        )
        parts = [part_of(both, halves[0]), keys, values, part_of(both, halves[1])]
        bias = None
        if config.attention_bias:
            names = {"q_proj": (2 * q, own_q), "k_proj": (kv, own_kv), "v_proj": (kv, own_kv)}
            q_bias, k_bias, v_bias = (
                weights.vector(f"{prefix}.{name}.bias", rows, part(own))
                for name, (rows, own) in names.items()
            )
            query, gate = q_bias.view(-1, 2, size).unbind(1)
            bias = torch.cat([query.flatten(), k_bias, v_bias, gate.flatten()])
        self.qkv_proj = Linear(ops, parts, bias)
        self._qkv_size = sum(heads.sizes)
        self.o_proj = load_rows(
            f"{prefix}.o_proj", d, q, config.attention_out_bias, weights, ops, heads.q_rows
        )
        num_heads, num_kv_heads = heads.counts
        self.attention = Attention(
            ops,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            cos_sin=cos_sin,
            q_norm=weights.vector(f"{prefix}.q_norm.weight", size),
            k_norm=weights.vector(f"{prefix}.k_norm.weight", size),
            eps=config.rms_norm_eps,
            weight_offset=config.norm_weight_offset,
        )

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        projected, residual = self.qkv_proj.normed(x, residual, norm)
        qkv, gate = projected.tensor_split([self._qkv_size], -1)
        y = self.attention(qkv.contiguous(), ctx)
        return self.o_proj.add(y * torch.sigmoid(gate), residual)


class Qwen3NextDecoderLayer(MixedDecoderLayer):
    """The delta rule or attention, then experts or an MLP."""

    __slots__ = ()

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> GatedDeltaNet:
        prefix = f"model.layers.{layer}.linear_attn"
        assert config.state is not None
        own = DeltaHeads.of(DeltaShape.of(config.state), ops.rank)
        inputs = cls.inputs(own)
        if config.raw.get("splits_delta_inputs"):
            inputs = replace(inputs, qkvz=split_inputs(own))
        if config.raw.get("tiles_value_heads"):
            inputs = replace(inputs, tiles_values=True)
        return GatedDeltaNet(config, prefix, own, inputs, weights, ops)

    @staticmethod
    def make_attention(
        config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> GatedAttention:
        return GatedAttention(config, layer, cos_sin, weights, ops)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if config.num_experts and config.moe_layers[layer]:
            return Qwen2MoeDecoderLayer.make_mlp(config, layer, weights, ops)
        return LlamaMLP(config, layer, weights, ops)

    @staticmethod
    def inputs(own: DeltaHeads) -> DeltaInputs:
        """One module each, whose rows are grouped by key head."""
        shape = own.shape
        ratio = shape.num_heads // shape.num_key_heads
        keys, values = (1, shape.key_dim), (ratio, shape.value_dim)
        return DeltaInputs(
            [
                (
                    "in_proj_qkvz",
                    2 * (shape.keys + shape.values),
                    _ungrouped([keys, keys, values, values], own),
                )
            ],
            [("in_proj_ba", 2 * shape.num_heads, _ungrouped([(ratio, 1), (ratio, 1)], own))],
        )


def split_inputs(own: DeltaHeads) -> list[tuple[str, int, Part]]:
    """``DeltaInputs.qkvz`` where queries, keys and values are a module, and the gate another."""
    shape = own.shape
    return [
        ("in_proj_qkv", 2 * shape.keys + shape.values, own.part(*own.channels())),
        ("in_proj_z", shape.values, own.part(own.value_rows())),
    ]


def _ungrouped(kinds: Sequence[tuple[int, int]], own: DeltaHeads) -> Rows:
    """A rank's rows of the first kind in every group, then of the second, ...

    kinds: (heads in a group, rows of a head); more than one head are value heads.
    """
    group, before = sum(heads * rows for heads, rows in kinds), 0
    ranges = []
    for heads, rows in kinds:
        for key in range(*own.keys):
            first, last = 0, heads
            if heads > 1:
                first = max(own.values[0] - key * heads, 0)
                last = min(own.values[1] - key * heads, heads)
            ranges.append(scaled((first, last), rows, key * group + before))
        before += heads * rows
    return Rows(tuple(ranges))


class Qwen3NextForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.25,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    layer_class: ClassVar[Callable[..., Any]] = Qwen3NextDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        step, dense = hf.int("decoder_sparse_step"), hf.values["mlp_only_layers"]
        num_experts = hf.int("num_experts", 512)
        return hf.config(
            **delta_fields(hf),
            num_experts=num_experts,
            num_experts_per_token=hf.int("num_experts_per_tok", 10),
            moe_intermediate_size=hf.int("moe_intermediate_size", 512),
            shared_expert_size=hf.int("shared_expert_intermediate_size", 512),
            renormalize_experts=hf.bool("norm_topk_prob"),
            moe_layers=tuple(
                num_experts > 0 and layer not in dense and (layer + 1) % step == 0
                for layer in range(hf.num_layers)
            ),
        )


def delta_fields(hf: HfConfig) -> dict[str, Any]:
    """Shared parts of Qwen's models with the delta rule."""
    bias = hf.bool("attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm_weight_offset": 1.0,
        "layer_kinds": layer_kinds(every_fourth(hf), KINDS),
        "state": delta_shape(hf).state,
    }
