"""SmolLM3ForCausalLM: Llama whose every fourth layer has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        interval = hf.int("no_rope_layer_interval", 4)
        # Despite its name: 1 where there is a rotary embedding.
        rope = hf.values.get("no_rope_layers") or [
            (layer + 1) % interval for layer in range(hf.num_layers)
        ]
        windows: tuple[int, ...] = ()
        if hf.bool("use_sliding_window"):
            windows = hf.windows(
                default_types=["full_attention" if r else "sliding_attention" for r in rope]
            )
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            mlp_bias=hf.bool("mlp_bias"),
            rope_layers=tuple(bool(r) for r in rope[: hf.num_layers]),
            sliding_windows=windows,
        )
