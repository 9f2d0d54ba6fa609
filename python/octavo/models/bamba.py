"""BambaForCausalLM: Mamba-2 in most layers, half-rotated attention in some, an MLP in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.llama import LlamaAttention, LlamaMLP
from octavo.models.mamba import MambaMixer, mamba_shape
from octavo.models.parts import layer_norms


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


class BambaDecoderLayer:
    """A mixer or attention, then an MLP."""

    __slots__ = ("attention", "input_layernorm", "mixer", "mlp", "post_norm", "recurrence")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.attention: Attention | None = None
        self.recurrence: MambaMixer | None = None
        self.mixer: LlamaAttention | MambaMixer
        if config.state_layers[layer]:
            self.mixer = self.recurrence = load_mamba(config, layer, weights, ops)
        else:
            self.mixer = LlamaAttention(config, layer, cos_sin, weights, ops)
            self.attention = self.mixer.attention
        self.post_norm = norm("post_attention_layernorm")
        self.mlp = LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.mixer.normed(x, residual, self.input_layernorm, ctx)
        return self.mlp.normed(x, residual, self.post_norm)


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
