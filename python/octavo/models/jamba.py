"""JambaForCausalLM: Mamba's first form in most layers, attention without positions, experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.routing import Routing
from octavo.layers.norm import RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.experts import LLAMA_NAMES, load_experts
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.llama import FeedForward, LlamaMLP
from octavo.models.mamba1 import NORMED, ChannelMixer, ChannelShape, dt_rank
from octavo.models.mixed_layer import MixedDecoderLayer

_DEFAULTS: Mapping[str, Any] = {
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "max_position_embeddings": 262144,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
}


class JambaDecoderLayer(MixedDecoderLayer):
    """A mixer or attention, then experts or an MLP."""

    __slots__ = ()

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> ChannelMixer:
        hf = HfConfig(config.raw, _DEFAULTS)
        prefix, shape = f"model.layers.{layer}.mamba", _shape(hf)

        def norm(name: str, size: int) -> RMSNorm:
            weight = weights.vector(f"{prefix}.{name}_layernorm.weight", size)
            return RMSNorm(ops, weight, config.rms_norm_eps)

        dt, b, c = NORMED
        norms = (norm(dt, shape.rank), norm(b, shape.state_size), norm(c, shape.state_size))
        return ChannelMixer(
            config,
            prefix,
            shape,
            weights,
            ops,
            bias=hf.bool("mamba_proj_bias"),
            conv_bias=hf.bool("mamba_conv_bias"),
            norms=norms,
        )

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        if not config.moe_layers[layer]:
            return LlamaMLP(config, layer, weights, ops)
        return load_experts(
            config,
            f"model.layers.{layer}.mlp",
            LLAMA_NAMES,
            weights,
            ops,
            router="router",
            routing=Routing(config.num_experts_per_token, renormalize=False),
        )


class JambaForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., Any]] = JambaDecoderLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"post_attention_layernorm": "pre_ff_layernorm",
        r"\.mlp\b": ".feed_forward",
        r"model\.norm\.": "model.final_layernorm.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        count = hf.num_layers
        attention, experts = (
            tuple(
                layer % hf.int(f"{kind}_layer_period") == hf.int(f"{kind}_layer_offset")
                for layer in range(count)
            )
            for kind in ("attn", "expert")
        )
        # GGUF files list the layers.
        if (kinds := hf.values.get("layers_block_type")) is not None:
            attention = tuple(kind == "attention" for kind in kinds)
        if (counts := hf.values.get("layers_num_experts")) is not None:
            experts = tuple(number > 1 for number in counts)
        num_experts = hf.int("num_experts")
        return hf.config(
            rope_layers=(False,) * count,
            layer_kinds=tuple("attention" if is_one else "state" for is_one in attention),
            state=_shape(hf).state,
            num_experts=num_experts,
            num_experts_per_token=hf.int("num_experts_per_tok"),
            moe_intermediate_size=hf.int("intermediate_size"),
            moe_layers=experts if num_experts > 1 else (False,) * count,
        )


def _shape(hf: HfConfig) -> ChannelShape:
    d = hf.int("hidden_size")
    return ChannelShape(
        int(hf.float("mamba_expand") * d),
        hf.int("mamba_d_state"),
        hf.int("mamba_d_conv"),
        dt_rank(hf, "mamba_dt_rank", d),
    )
