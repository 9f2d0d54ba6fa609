"""Qwen3ForCausalLM: Llama with a norm of each head's query and key before the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM
from octavo.models.qwen2 import qwen_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 128}

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            qk_norm=True,
            sliding_windows=qwen_windows(hf),
        )
