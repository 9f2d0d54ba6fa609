"""Gemma3ForCausalLM, the text model: Gemma 2 with query and key norms in place of softcaps.

Five of six layers are local; those turn by a rotary embedding of their own, which is never scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.gemma import gemma_fields
from octavo.models.gemma2 import Gemma2ForCausalLM
from octavo.models.hf_config import HfConfig


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 131072,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        pattern = hf.int("sliding_window_pattern", 6)
        types = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(hf.num_layers)
        ]
        unscaled = {"rope_theta": hf.float("rope_local_base_freq")}
        parameters = hf.values.get("rope_parameters") or {}
        local = hf.rope(
            rope_parameters=parameters.get("sliding_attention") or unscaled, rope_scaling=None
        )
        windows = hf.windows(default_types=types)
        if hf.bool("use_bidirectional_attention"):
            # Half of it to each side.
            windows = tuple(window // 2 + 1 if window else 0 for window in windows)
        return hf.config(
            **gemma_fields(hf),
            qk_norm=True,
            local_rope=local,
            attention_scale=hf.float("query_pre_attn_scalar") ** -0.5,
            attn_logit_softcap=hf.float("attn_logit_softcapping", 0.0),
            final_logit_softcap=hf.float("final_logit_softcapping", 0.0),
            sliding_windows=windows,
        )
