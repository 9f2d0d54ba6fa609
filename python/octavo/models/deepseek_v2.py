"""DeepseekV2ForCausalLM, V2 and V2-Lite: latent attention, and experts by softmax in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.models.config import ModelConfig
from octavo.models.deepseek_v3 import DeepseekV3DecoderLayer, latent_fields
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.glm4_moe import deepseek_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, FeedForward, LlamaForCausalLM, LlamaMLP


class DeepseekV2DecoderLayer(DeepseekV3DecoderLayer):
    """Latent attention, then experts or an MLP."""

    __slots__ = ()

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        groups, top_groups = config.expert_groups
        routing = Routing(
            config.num_experts_per_token,
            renormalize=False,
            groups=groups,
            top_groups=top_groups,
            scale=config.routed_scale,
        )
        size = config.num_shared_experts * config.moe_intermediate_size
        shared = LlamaMLP(config, layer, weights, ops, name="mlp.shared_experts", size=size)
        prefix = f"model.layers.{layer}.mlp"
        return load_experts(
            config, prefix, LLAMA_NAMES, weights, ops, routing=routing, shared=shared
        )


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "topk_method": "greedy",
        "v_head_dim": 128,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = DeepseekV2DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        fields = deepseek_fields(hf)
        method = str(hf.values["topk_method"])
        if method == "greedy":
            fields["expert_groups"] = (1, 1)
        elif method != "group_limited_greedy":
            raise ModelLoadError(f"config.json: topk_method {method!r} is not supported")
        return hf.config(**latent_fields(hf), **fields, mlp_bias=hf.bool("mlp_bias"))
