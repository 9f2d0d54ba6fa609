"""Lfm3ForCausalLM: LFM2 with local attention, a gate of each head, and norms after blocks too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM, Recurrence, layer_kinds
from octavo.models.lfm2 import ShortConv
from octavo.models.llama import LlamaAttention, LlamaMLP
from octavo.models.parts import heads_of, layer_norms, load_columns

_DEFAULTS: Mapping[str, Any] = {
    "conv_L_cache": 7,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "num_key_value_heads": 4,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 1000000.0,
        },
    },
    "sliding_window": 256,
    "tie_word_embeddings": True,
    "use_attention_gate": True,
    "use_sandwich_norm": True,
}
_KINDS = {"full_attention": "attention", "sliding_attention": "attention", "conv": "state"}


class GatedAttention(LlamaAttention):
    """Attention of whose heads each is weighed by a sigmoid of the layer's input."""

    __slots__ = ("_gate",)

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        super().__init__(config, layer, cos_sin, weights, ops)
        self._gate = None
        if HfConfig(config.raw, _DEFAULTS).bool("use_attention_gate"):
            parts = {f"model.layers.{layer}.self_attn.gate_proj": config.num_heads}
            own = heads_of(config, ops.rank).q
            self._gate = load_columns(parts, config.hidden_size, False, weights, ops, [own])

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        out = self.attend(self.qkv_proj(x), ctx)
        if self._gate is not None:
            gate = torch.sigmoid(self._gate(x))[:, :, None]
            out = (out.view(len(x), gate.shape[1], -1) * gate).flatten(1)
        return self.o_proj(out)


class Lfm3DecoderLayer:
    """A convolution or attention and an MLP, each between two norms."""

    __slots__ = (
        "attention",
        "input_layernorm",
        "mixer",
        "mixer_norm",
        "mlp",
        "mlp_norm",
        "post_attention_layernorm",
        "recurrence",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.attention = None
        self.recurrence: Recurrence | None = None
        self.mixer: ShortConv | GatedAttention
        if config.state_layers[layer]:
            self.mixer = self.recurrence = ShortConv(config, layer, weights, ops)
        else:
            self.mixer = GatedAttention(config, layer, cos_sin, weights, ops)
            self.attention = self.mixer.attention
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = LlamaMLP(config, layer, weights, ops)
        self.mixer_norm: RMSNorm | None = None
        self.mlp_norm: RMSNorm | None = None
        if HfConfig(config.raw, _DEFAULTS).bool("use_sandwich_norm"):
            self.mixer_norm, self.mlp_norm = norm("post_operator_norm"), norm("post_ffn_norm")

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.mixer(x, ctx)
        if self.mixer_norm is not None:
            x = self.mixer_norm(x)
        x, residual = self.post_attention_layernorm.add(x, residual)
        x = self.mlp(x)
        return x if self.mlp_norm is None else self.mlp_norm(x), residual


class Lfm3ForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    layer_class: ClassVar[Callable[..., Any]] = Lfm3DecoderLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"input_layernorm": "operator_norm",
        r"post_attention_layernorm": "ffn_norm",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.up_proj": "feed_forward.w3",
        r"mlp\.down_proj": "feed_forward.w2",
        r"model\.norm\.": "model.embedding_norm.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        types = hf.values.get("layer_types") or [
            "full_attention"
            if layer % 4 == 2
            else ("sliding_attention" if layer and layer % 4 == 0 else "conv")
            for layer in range(hf.num_layers)
        ]
        bias = hf.bool("attention_bias")
        return hf.config(
            qk_norm=True,
            attention_bias=bias,
            attention_out_bias=bias,
            rms_norm_eps=hf.float("norm_eps"),
            layer_kinds=layer_kinds(types, _KINDS),
            state=StateShape((hf.int("hidden_size"), hf.int("conv_L_cache") - 1)),
            sliding_windows=hf.windows(default_types=types),
            rope=hf.rope("full_attention"),
            local_rope=hf.rope("sliding_attention"),
        )
