"""Ernie4_5ForCausalLM: Llama whose rope turns neighbours, with all biases or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class Ernie4_5ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**ernie_fields(hf))


def ernie_fields(hf: HfConfig) -> dict[str, Any]:
    """Fields that the dense models and those with experts share."""
    bias = hf.bool("use_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "interleaved_rope": True,
    }
