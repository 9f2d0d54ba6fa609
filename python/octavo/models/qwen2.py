"""Qwen2ForCausalLM, Qwen2 and 2.5: Llama with biases on queries, keys and values alone.

No config key switches those biases: they are always there.
"""

from __future__ import annotations

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(attention_bias=True, sliding_windows=qwen_windows(hf))


def qwen_windows(hf: HfConfig) -> tuple[int, ...]:
    """Windows only where ``use_sliding_window`` says so, from layer ``max_window_layers`` on."""
    if not hf.bool("use_sliding_window"):
        return ()
    full = hf.int("max_window_layers", 0)
    types = ["full_attention" if i < full else "sliding_attention" for i in range(hf.num_layers)]
    return hf.windows(default_types=types)
