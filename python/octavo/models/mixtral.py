"""MixtralForCausalLM: Mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.kernels.weights import Columns, Rows
from octavo.layers.moe import MoE
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import (
    DecoderLayer,
    FeedForward,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)
from octavo.models.parts import width_of


class MixtralDecoderLayer(LlamaDecoderLayer):
    """Attention, then experts."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        return load_experts(config, prefix, ("w1", "w3", "w2"), weights, ops)


class MixtralForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5}
    layer_class: ClassVar[Callable[..., DecoderLayer]] = MixtralDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            sliding_windows=hf.windows(),
            num_experts=hf.int("num_local_experts", 8),
            num_experts_per_token=hf.int("num_experts_per_tok", 2),
            moe_intermediate_size=hf.int("intermediate_size"),
        )


def load_experts(
    config: ModelConfig, prefix: str, names: tuple[str, str, str], weights: Weights, ops: OpSet
) -> MoE:
    """The router and experts below ``prefix``; ``names``: of an expert's gate, up and down."""
    d, f, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    gate, up, down = names
    experts = f"{prefix}.experts"
    # Every rank has a part of each expert, and all of the router.
    begin, end = width_of(f, ops.rank)
    is_whole = ops.rank.size == 1
    rows, columns = (None, None) if is_whole else (Rows(((begin, end),)), Columns(begin, end))
    gates = weights.experts(experts, count, gate, (f, d), rows)
    ups = weights.experts(experts, count, up, (f, d), rows)
    return MoE(
        ops,
        weights.linear(f"{prefix}.gate", (count, d)),
        list(zip(gates, ups, strict=True)),
        list(weights.experts(experts, count, down, (d, f), columns)),
        routing=Routing(config.num_experts_per_token, config.renormalize_experts),
        act=config.hidden_act,
    )
