"""BambaForCausalLM: Mamba-2 in most layers, half-rotated attention in some, an MLP in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.mamba import MambaMixer, mamba_shape
from octavo.models.mixed_layer import MixedDecoderLayer


def load_mamba(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> MambaMixer:
    """The mixer of a layer whose config.json has ``mamba_...`` keys."""
    hf = HfConfig(config.raw, {"mamba_conv_bias": True})
    bias = hf.bool("mamba_proj_bias")
    return MambaMixer(
        config,
        f"model.layers.{layer}.mamba",
        mamba_shape(hf, int(hf.float("mamba_expand", 2) * config.hidden_size)),
        weights,
        ops,
        bias=bias,
        out_bias=bias,
        conv_bias=hf.bool("mamba_conv_bias"),
    )


class BambaDecoderLayer(MixedDecoderLayer):
    """A mixer or attention, then an MLP."""

    __slots__ = ()

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> MambaMixer:
        return load_mamba(config, layer, weights, ops)


class BambaForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "partial_rotary_factor": 0.5,
        "attn_layer_indices": [],
    }
    layer_class: ClassVar[Callable[..., Any]] = BambaDecoderLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"post_attention_layernorm": "pre_ff_layernorm",
        r"\.mlp\.": ".feed_forward.",
        r"model\.norm\.": "model.final_layernorm.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias, attention = hf.bool("attention_bias"), hf.values["attn_layer_indices"]
        inner = int(hf.float("mamba_expand", 2) * hf.int("hidden_size"))
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            mlp_bias=hf.bool("mlp_bias"),
            layer_kinds=tuple(
                "attention" if layer in attention else "state" for layer in range(hf.num_layers)
            ),
            state=mamba_shape(hf, inner).state,
        )
