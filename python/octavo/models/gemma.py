"""GemmaForCausalLM: Llama with scaled embeddings, norms around 1 + weight, and GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class GemmaForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 256, "tie_word_embeddings": True}

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**gemma_fields(hf))


def gemma_fields(hf: HfConfig) -> dict[str, Any]:
    """Config fields common to all generations of Gemma."""
    # The first release's "gelu" is its approximation.
    act = str(hf.values.get("hidden_activation") or hf.values.get("hidden_act") or "gelu")
    bias = hf.bool("attention_bias")
    return {
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act,
        "norm_weight_offset": 1.0,
        "embedding_scale": float(hf.int("hidden_size") ** 0.5),
        "attention_bias": bias,
        "attention_out_bias": bias,
    }
