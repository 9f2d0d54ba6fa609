"""Glm4MoeLiteForCausalLM, GLM-4.7-Flash: DeepSeek V3's layers with another rope and dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.models.config import ModelConfig
from octavo.models.deepseek_v3 import DeepseekV3ForCausalLM, latent_fields
from octavo.models.glm4_moe import deepseek_fields
from octavo.models.hf_config import HfConfig


class Glm4MoeLiteForCausalLM(DeepseekV3ForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "n_shared_experts": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "v_head_dim": 256,
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        fields = deepseek_fields(hf)
        types = hf.values.get("mlp_layer_types")
        if types is not None:
            fields["moe_layers"] = tuple(kind == "sparse" for kind in types)
        return hf.config(**latent_fields(hf), **fields)
