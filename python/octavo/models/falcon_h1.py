"""FalconH1ForCausalLM: Mamba-2 and attention side by side in every layer, then an MLP.

Trained with factors on what goes into each part and comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
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
from octavo.models.parts import heads_of, layer_norms, width_of


class ScaledAttention(LlamaAttention):
    """Attention with a factor on its input, on its keys, and on its output."""

    __slots__ = ("_out_scale", "_qkv_scale")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        hf = HfConfig(config.raw, FalconH1ForCausalLM.hf_defaults)
        own, keys = hf.float("attention_in_multiplier"), hf.float("key_multiplier")
        sizes = heads_of(config, ops.rank).sizes
        self._qkv_scale = _scale_vector(sizes, (own, own * keys, own), cos_sin.device, weights)
        if self.qkv_proj.bias is not None:
            # It is added to what the scaled input has become: all of the vector but that factor.
            self.qkv_proj.bias = self.qkv_proj.bias / own
        self._out_scale = hf.float("attention_out_multiplier")

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        qkv = self.qkv_proj(x) * self._qkv_scale
        return self.o_proj(self.attention(qkv, ctx)) * self._out_scale


class ScaledMLP(LlamaMLP):
    """An MLP with a factor on its gate and on its output."""

    __slots__ = ("_down_scale", "_gate_scale")

    def __init__(
        self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet, device: torch.device
    ) -> None:
        super().__init__(config, layer, weights, ops)
        hf = HfConfig(config.raw, FalconH1ForCausalLM.hf_defaults)
        gate, self._down_scale = (float(x) for x in hf.values["mlp_multipliers"])
        begin, end = width_of(config.intermediate_size, ops.rank)
        sizes = (end - begin, end - begin)
        self._gate_scale = _scale_vector(sizes, (gate, 1.0), device, weights)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self._gated_activation(self.gate_up_proj(x) * self._gate_scale, self.act)
        return self.down_proj(hidden) * self._down_scale


def _scale_vector(
    sizes: Sequence[int], factors: Sequence[float], device: torch.device, weights: Weights
) -> Tensor:
    """Each factor as often as its size says: [sum(sizes)]."""
    parts = [torch.full((size,), f) for size, f in zip(sizes, factors, strict=True)]
    return torch.cat(parts).to(device=device, dtype=weights.act_dtype)


def _inner(hf: HfConfig) -> int:
    return hf.int("mamba_d_ssm", int(hf.float("mamba_expand", 2) * hf.int("hidden_size")))


class FalconH1DecoderLayer:
    """The mixer's and the attention's sum, then an MLP."""

    __slots__ = ("attention", "mamba_scale", "mlp", "norm", "post_norm", "recurrence", "self_attn")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf = HfConfig(config.raw, FalconH1ForCausalLM.hf_defaults)
        norm = layer_norms(config, layer, weights, ops)
        self.norm = norm("input_layernorm")
        has_norm = hf.bool("mamba_rms_norm")
        self.recurrence = MambaMixer(
            config,
            f"model.layers.{layer}.mamba",
            mamba_shape(hf, _inner(hf)),
            weights,
            ops,
            bias=hf.bool("mamba_proj_bias"),
            out_bias=hf.bool("projectors_bias"),
            conv_bias=hf.bool("mamba_conv_bias"),
            gate_first=not hf.bool("mamba_norm_before_gate") if has_norm else None,
            scales=(hf.float("ssm_in_multiplier"), hf.values["ssm_multipliers"]),
        )
        self.mamba_scale = hf.float("ssm_out_multiplier")
        self.self_attn = ScaledAttention(config, layer, cos_sin, weights, ops)
        self.attention: Attention = self.self_attn.attention
        self.post_norm = norm("post_attention_layernorm")
        self.mlp = ScaledMLP(config, layer, weights, ops, cos_sin.device)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm.add(x, residual)
        x = self.recurrence(x, ctx) * self.mamba_scale + self.self_attn(x, ctx)
        x, residual = self.post_norm.add(x, residual)
        return self.mlp(x), residual


class FalconH1ForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "rms_norm_eps": 1e-5,
        "mamba_conv_bias": True,
        "mamba_norm_before_gate": True,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
        **dict.fromkeys(
            (
                "attention_in_multiplier",
                "attention_out_multiplier",
                "embedding_multiplier",
                "key_multiplier",
                "lm_head_multiplier",
                "ssm_in_multiplier",
                "ssm_out_multiplier",
            ),
            1.0,
        ),
    }
    layer_class: ClassVar[Callable[..., Any]] = FalconH1DecoderLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"post_attention_layernorm": "pre_ff_layernorm",
        r"\.mlp\.": ".feed_forward.",
        r"model\.norm\.": "model.final_layernorm.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias = hf.bool("attention_bias")
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            mlp_bias=hf.bool("mlp_bias"),
            embedding_scale=hf.float("embedding_multiplier"),
            logit_scale=hf.float("lm_head_multiplier"),
            layer_kinds=("both",) * hf.num_layers,
            state=mamba_shape(hf, _inner(hf)).state,
        )
