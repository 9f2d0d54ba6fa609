"""Olmo3ForCausalLM: OLMo 2 with three local layers to a global one, the only one that stretches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.olmo2 import Olmo2ForCausalLM


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "sliding_window": 4096,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        types = [
            "sliding_attention" if (layer + 1) % 4 else "full_attention"
            for layer in range(hf.num_layers)
        ]
        parameters = hf.values.get("rope_parameters") or {}
        # Files of transformers 4 have one rope, whose scaling is the global layers' alone.
        local = parameters.get("sliding_attention") or {
            "rope_theta": parameters.get("rope_theta") or hf.float("rope_theta")
        }
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            sliding_windows=hf.windows(default_types=types),
            local_rope=hf.rope(rope_parameters=local, rope_scaling=None),
        )
