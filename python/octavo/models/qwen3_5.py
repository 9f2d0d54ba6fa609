"""Qwen3_5ForCausalLM: Qwen3-Next with projections of their own, dense or with experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.gated_delta import DeltaHeads, DeltaInputs
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextForCausalLM,
    delta_fields,
    split_inputs,
)


class Qwen3_5DecoderLayer(Qwen3NextDecoderLayer):
    """See Qwen3NextDecoderLayer."""

    __slots__ = ()

    @staticmethod
    def inputs(own: DeltaHeads) -> DeltaInputs:
        """A module each of queries, keys and values, gates, strengths, decays."""
        heads, shape = own.part(own.values), own.shape
        return DeltaInputs(
            split_inputs(own),
            [("in_proj_b", shape.num_heads, heads), ("in_proj_a", shape.num_heads, heads)],
        )


class Qwen3_5ForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = Qwen3NextForCausalLM.hf_defaults
    layer_class: ClassVar[Callable[..., Any]] = Qwen3_5DecoderLayer
    other_parts: ClassVar[tuple[str, ...]] = ("mtp.",)

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**delta_fields(hf))


class Qwen3_5MoeForCausalLM(Qwen3_5ForCausalLM):
    """The same with experts in every layer, and one that all tokens go to."""

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(
            **delta_fields(hf),
            intermediate_size=hf.int("moe_intermediate_size", 512),
            num_experts=hf.int("num_experts", 256),
            num_experts_per_token=hf.int("num_experts_per_tok", 8),
            moe_intermediate_size=hf.int("moe_intermediate_size", 512),
            shared_expert_size=hf.int("shared_expert_intermediate_size", 512),
            moe_layers=(True,) * hf.num_layers,
        )
