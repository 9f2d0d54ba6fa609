"""MistralForCausalLM: Llama with a sliding window in every layer."""

from __future__ import annotations

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(sliding_windows=hf.windows())
