"""MiniMaxForCausalLM, Text-01: lightning attention in most layers, softmax in some, experts.

Lightning attention keeps the sum of all keys' outer products with their values, which fades at a
rate of each head (arXiv 2401.04658). That is Mamba-2's scan with steps of one: values are what is
written, keys and queries what writes and reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import share
from octavo.layers.context import LayerState, StepContext
from octavo.layers.norm import RMSNorm, normed_part
from octavo.models.config import ModelConfig, StateShape
from octavo.models.experts import load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import (
    NO_STATE,
    HybridForCausalLM,
    Recurrence,
    layer_kinds,
    recurrent_ops,
)
from octavo.models.llama import LlamaAttention
from octavo.models.parts import layer_norms, load_columns, load_rows, scaled

_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
_KINDS = {"full_attention": "attention", "linear_attention": "state"}
_EXPERT_NAMES = ("w1", "w3", "w2")
# Of the norm after lightning attention, whatever the config says of the others.
_LIGHTNING_EPS = 1e-6


class LightningAttention:
    """Queries, keys and values of each head, their scan, a norm, a gate, the output projection."""

    __slots__ = (
        "_activation",
        "_decay",
        "_gate",
        "_norm",
        "_ops",
        "_own",
        "_rank",
        "_sizes",
        "_zeros",
        "act",
        "out_proj",
        "qkv_proj",
        "state",
    )

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix, d, dim = f"model.layers.{layer}.self_attn", config.hidden_size, config.head_dim
        heads, width, rank = config.num_heads, config.q_size, ops.rank
        first, last = share(heads, rank.rank, rank.size)
        own = scaled((first, last), dim)
        # A head's queries, keys and values lie together.
        qkv = {f"{prefix}.qkv_proj": 3 * width}
        self.qkv_proj = load_columns(qkv, d, False, weights, ops, [scaled(own, 3)])
        gate = {f"{prefix}.output_gate": width}
        self._gate = load_columns(gate, d, False, weights, ops, [own])
        self.out_proj = load_rows(f"{prefix}.out_proj", d, width, False, weights, ops, own)
        weight = weights.vector(f"{prefix}.norm.weight", width)
        self._norm = RMSNorm(ops, weight, _LIGHTNING_EPS)
        slopes = _slopes(heads, layer, config.num_layers)[first:last]
        self._decay = -slopes.to(weight.device)
        self._zeros = torch.zeros_like(self._decay)
        self._sizes, self._own, self._rank = (last - first, dim), own, rank
        self._activation, self.act = ops.activation, config.hidden_act
        self._ops = recurrent_ops(ops)
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's heads."""
        heads, dim = self._sizes
        return StateShape((0, 0), (heads, dim, dim))

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        heads, dim = self._sizes
        qkv = self._activation(self.qkv_proj(x), self.act).view(len(x), heads, 3, dim)
        assert self.state.recurrent is not None
        mixed = self._ops.selective_scan(
            qkv.flip(2).transpose(1, 2).reshape(len(x), -1),
            torch.zeros((len(x), heads), dtype=x.dtype, device=x.device),
            self._decay,
            self._zeros,
            self._zeros,
            self.state.recurrent,
            ctx.steps,
            num_groups=heads,
            dt_limits=(1.0, 1.0),
        )
        normed = normed_part(mixed, self._norm, self._own, self._rank)
        return self.out_proj(torch.sigmoid(self._gate(x)) * normed)


class MiniMaxDecoderLayer:
    """Attention of either kind and experts; what a norm gives is also what is added to."""

    __slots__ = (
        "_factors",
        "attention",
        "experts",
        "input_layernorm",
        "mixer",
        "post_attention_layernorm",
        "recurrence",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf, norm = HfConfig(config.raw, _DEFAULTS), layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.attention = None
        self.recurrence: Recurrence | None = None
        self.mixer: LightningAttention | LlamaAttention
        kind = "linear" if config.state_layers[layer] else "full"
        if config.state_layers[layer]:
            self.mixer = self.recurrence = LightningAttention(config, layer, weights, ops)
        else:
            self.mixer = LlamaAttention(config, layer, cos_sin, weights, ops)
            self.attention = self.mixer.attention
        self.post_attention_layernorm = norm("post_attention_layernorm")
        prefix = f"model.layers.{layer}.block_sparse_moe"
        self.experts = load_experts(config, prefix, _EXPERT_NAMES, weights, ops)
        self._factors = [
            hf.float(f"{part}_{name}_factor", 1.0)
            for part in (f"{kind}_attn", "mlp")
            for name in ("alpha", "beta")
        ]

    def __call__(self, x: None, residual: Tensor, ctx: StepContext) -> tuple[None, Tensor]:
        alpha, beta, mlp_alpha, mlp_beta = self._factors
        normed = self.input_layernorm(residual)
        residual = normed * alpha + self.mixer(normed, ctx) * beta
        normed = self.post_attention_layernorm(residual)
        return None, normed * mlp_alpha + self.experts(normed) * mlp_beta


class MiniMaxForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., Any]] = MiniMaxDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        types = hf.values.get("layer_types") or [
            "linear_attention" if layer % 2 else "full_attention" for layer in range(hf.num_layers)
        ]
        heads, dim = hf.int("num_attention_heads"), hf.head_dim
        return hf.config(
            sliding_windows=(hf.int("sliding_window", 0),) * hf.num_layers,
            layer_kinds=layer_kinds(types, _KINDS),
            state=StateShape((0, 0), (heads, dim, dim)),
            num_experts=hf.int("num_local_experts"),
            num_experts_per_token=hf.int("num_experts_per_tok"),
            moe_intermediate_size=hf.int("intermediate_size"),
        )


def _slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """float32 [H]: how fast each head's state fades, less in later layers."""
    slopes = (1 / 2 ** (8 / num_heads)) ** (torch.arange(num_heads, dtype=torch.float32) + 1)
    return slopes * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
