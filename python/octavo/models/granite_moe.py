"""GraniteMoeForCausalLM: Granite with a mixture of experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.layers.moe import MoE
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, ExpertShare, load_experts
from octavo.models.granite import GraniteDecoderLayer, granite_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, FeedForward, LlamaForCausalLM


class GraniteMoeDecoderLayer(GraniteDecoderLayer):
    """Attention, then experts whose gate and up are one tensor, except in GGUF files."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        if not config.fused_experts:
            routing = Routing(config.num_experts_per_token)
            return load_experts(
                config, prefix, LLAMA_NAMES, weights, ops, router="router.layer", routing=routing
            )
        d, f, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
        part, shape = ExpertShare.of(config, ops.rank), (2 * f, d)
        both = weights.experts(prefix, count, "input_linear", shape, part.both_rows, part.own)
        return MoE(
            ops,
            weights.linear(f"{prefix}.router.layer", (count, d)),
            [[one] for one in both],
            list(weights.experts(prefix, count, "output_linear", (d, f), part.columns, part.own)),
            routing=Routing(config.num_experts_per_token),
            act=config.hidden_act,
            first=part.own[0],
        )


class GraniteMoeForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    layer_class: ClassVar[Callable[..., DecoderLayer]] = GraniteMoeDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            **granite_fields(hf),
            num_experts=hf.int("num_local_experts", 8),
            num_experts_per_token=hf.int("num_experts_per_tok", 2),
            moe_intermediate_size=hf.int("intermediate_size"),
            fused_experts=True,
        )
