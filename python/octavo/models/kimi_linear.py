"""KimiLinearForCausalLM: Kimi's delta attention in most layers, latent attention in some.

Kimi's delta attention is the gated delta rule with a decay of each row of a head's state; decays
and output gates come out of projections of a low rank. Latent attention has no rope. The experts
are DeepSeek V3's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.kernels.weights import Range, Rows, share
from octavo.layers.context import LayerState, StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.deepseek_v3 import DeepseekAttention, latent_fields
from octavo.models.experts import load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import (
    NO_STATE,
    HybridForCausalLM,
    layer_kinds,
    load_taps,
    recurrent_ops,
)
from octavo.models.llama import FeedForward, LlamaMLP
from octavo.models.mixed_layer import MixedDecoderLayer
from octavo.models.parts import load_columns, load_linear, load_rows, scaled

_KINDS = {"full_attention": "attention", "linear_attention": "state"}
_EXPERT_NAMES = ("w1", "w3", "w2")
_MOE = "block_sparse_moe"


class KimiDeltaAttention:
    """Projections, a causal convolution of each, the rule, a norm and a gate of each head."""

    __slots__ = (
        "_decay",
        "_dt_bias",
        "_forget",
        "_gate",
        "_norm",
        "_ops",
        "_sizes",
        "_taps",
        "b_proj",
        "o_proj",
        "qkv_proj",
        "state",
    )

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix, d, shape = f"model.layers.{layer}.self_attn", config.hidden_size, config.state
        assert shape is not None
        assert shape.recurrent is not None
        (_, past), (heads, dim, _) = shape.conv, shape.recurrent
        own = share(heads, ops.rank.rank, ops.rank.size)
        width, rows = heads * dim, scaled(own, dim)
        part = Rows((rows,)) if ops.rank.size > 1 else None

        def of_heads(name: str, size: int, columns: int, wanted: Range) -> Linear:
            parts = {f"{prefix}.{name}_proj": size}
            return load_columns(parts, columns, False, weights, ops, (wanted,))

        def low_rank(name: str) -> tuple[Linear, Linear]:
            narrow = load_linear({f"{prefix}.{name}_a_proj": dim}, d, False, weights, ops)
            return narrow, of_heads(f"{name}_b", width, dim, rows)

        parts = {f"{prefix}.{name}_proj": width for name in "qkv"}
        self.qkv_proj = load_columns(parts, d, False, weights, ops, (rows, rows, rows))
        taps = [
            load_taps(f"{prefix}.{name}_conv1d.weight", width, past + 1, weights, part)
            for name in "qkv"
        ]
        self._taps = torch.cat(taps)
        self._forget, self._gate = low_rank("f"), low_rank("g")
        self.b_proj = of_heads("b", heads, d, own)
        self.o_proj = load_rows(f"{prefix}.o_proj", d, width, False, weights, ops, rows)
        rates = weights.tensor(f"{prefix}.A_log", (1, 1, heads, 1)).flatten()[slice(*own)]
        self._decay = -torch.exp(rates.float())
        self._dt_bias = weights.vector(f"{prefix}.dt_bias", width, part).float()
        weight = weights.vector(f"{prefix}.o_norm.weight", dim)
        self._norm = RMSNorm(ops, weight, config.rms_norm_eps)
        self._sizes = (own[1] - own[0], dim)
        self._ops = recurrent_ops(ops)
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's heads."""
        heads, dim = self._sizes
        channels, width = self._taps.shape
        return StateShape((channels, width - 1), (heads, dim, dim))

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        x, residual = norm.add(x, residual)
        (heads, dim), steps = self._sizes, ctx.steps
        assert self.state.recurrent is not None
        qkv = self._ops.causal_conv(
            self.qkv_proj(x), self._taps, None, self.state.conv, steps, activation="silu"
        )
        (forget_a, forget_b), (gate_a, gate_b) = self._forget, self._gate
        out = self._ops.gated_delta_rule(
            qkv,
            forget_b(forget_a(x)),
            self.b_proj(x),
            self._decay,
            self._dt_bias,
            self.state.recurrent,
            steps,
            num_key_heads=heads,
        )
        normed = self._norm(out.view(-1, dim)).view(-1, heads * dim)
        return self.o_proj.add(normed * torch.sigmoid(gate_b(gate_a(x))), residual)


class KimiLinearDecoderLayer(MixedDecoderLayer):
    """Either attention, then experts or an MLP."""

    __slots__ = ()

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> KimiDeltaAttention:
        return KimiDeltaAttention(config, layer, weights, ops)

    @staticmethod
    def make_attention(
        config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> DeepseekAttention:
        return DeepseekAttention(config, layer, cos_sin, weights, ops)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            # transformers writes a dense MLP under the experts' name.
            at = f"layers.{layer}.{_MOE}."
            name = _MOE if any(at in found for found in weights.unread()) else "mlp"
            return LlamaMLP(config, layer, weights, ops, name=name)
        prefix, count = f"model.layers.{layer}.{_MOE}", config.num_experts
        bias = weights.vector(f"{prefix}.gate.e_score_correction_bias", count)
        groups, top_groups = config.expert_groups
        routing = Routing(
            config.num_experts_per_token,
            config.renormalize_experts,
            is_sigmoid=True,
            bias=bias.float(),
            groups=groups,
            top_groups=top_groups,
            group_scores=2,
            scale=config.routed_scale,
        )
        shared = None
        if config.num_shared_experts:
            size = config.num_shared_experts * config.moe_intermediate_size
            name = f"{_MOE}.shared_experts"
            shared = LlamaMLP(config, layer, weights, ops, name=name, size=size)
        return load_experts(
            config, prefix, _EXPERT_NAMES, weights, ops, routing=routing, shared=shared
        )


class KimiLinearForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "linear_conv_kernel_dim": 4,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
        "v_head_dim": 128,
    }
    layer_class: ClassVar[Callable[..., Any]] = KimiLinearDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        # Releases have these in a mapping of their own.
        own = hf.values.get("linear_attn_config") or {}
        heads = int(own.get("num_heads") or hf.int("linear_num_heads"))
        dim = int(own.get("head_dim") or hf.int("linear_head_dim"))
        past = int(own.get("short_conv_kernel_size") or hf.int("linear_conv_kernel_dim")) - 1
        count = hf.num_layers
        kinds = hf.values.get("mlp_layer_types")
        if kinds is None:
            dense = hf.int("first_k_dense_replace")
            kinds = ["dense"] * dense + ["sparse"] * (count - dense)
        return hf.config(
            **latent_fields(hf),
            rope_layers=(False,) * count,
            layer_kinds=layer_kinds(_layer_types(hf, own), _KINDS),
            state=StateShape((3 * heads * dim, past), (heads, dim, dim)),
            num_experts=hf.int("num_experts"),
            num_experts_per_token=hf.int("num_experts_per_token"),
            moe_intermediate_size=hf.int("moe_intermediate_size"),
            num_shared_experts=hf.int("num_shared_experts"),
            renormalize_experts=hf.bool("moe_renormalize"),
            routed_scale=hf.float("routed_scaling_factor"),
            expert_groups=(hf.int("num_expert_group"), hf.int("topk_group")),
            moe_layers=tuple(kind == "sparse" for kind in kinds),
        )


def _layer_types(hf: HfConfig, own: Mapping[str, Any]) -> list[str]:
    """Each layer's type; releases list the layers of either type, counted from 1."""
    given = hf.values.get("layer_types")
    if given is not None:
        return list(given)
    if "full_attn_layers" not in own:
        return [
            "full_attention" if layer and layer % 4 == 0 else "linear_attention"
            for layer in range(hf.num_layers)
        ]
    full = set(own["full_attn_layers"])
    if full - set(range(1, hf.num_layers + 1)):
        raise ModelLoadError(f"config.json: full_attn_layers {sorted(full)} are not layers")
    return [
        "full_attention" if layer + 1 in full else "linear_attention"
        for layer in range(hf.num_layers)
    ]
