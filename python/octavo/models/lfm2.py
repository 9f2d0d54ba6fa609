"""Lfm2ForCausalLM: short gated convolutions in most layers, attention with head norms in some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Rows
from octavo.layers.context import LayerState, StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import NO_STATE, HybridForCausalLM, layer_kinds, load_taps, recurrent_ops
from octavo.models.mixed_layer import MixedDecoderLayer
from octavo.models.parts import load_columns, load_rows, width_of


class ShortConv:
    """out(c * conv(b * v)) of b, c, v = in(x)."""

    __slots__ = ("_bias", "_short_conv", "_taps", "in_proj", "out_proj", "state")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix = f"model.layers.{layer}.conv"
        d, bias = config.hidden_size, bool(config.raw.get("conv_bias"))
        assert config.state is not None
        channels, past = config.state.conv
        own = width_of(d, ops.rank)
        part = Rows((own,)) if ops.rank.size > 1 else None
        bcv = {f"{prefix}.in_proj": [d, d, d]}
        self.in_proj = load_columns(bcv, d, bias, weights, ops, (own, own, own))
        self._taps = load_taps(f"{prefix}.conv.weight", channels, past + 1, weights, part)
        self._bias = weights.vector(f"{prefix}.conv.bias", channels, part) if bias else None
        self.out_proj = load_rows(f"{prefix}.out_proj", d, d, bias, weights, ops, own)
        self._short_conv = recurrent_ops(ops).short_conv
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's channels."""
        channels, width = self._taps.shape
        return StateShape((channels, width - 1))

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        bcv, residual = self.in_proj.normed(x, residual, norm)
        return self.out_proj.add(self._convolve(bcv, ctx), residual)

    def __call__(self, x: Tensor, ctx: StepContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        return self.out_proj(self._convolve(self.in_proj(x), ctx))

    def _convolve(self, bcv: Tensor, ctx: StepContext) -> Tensor:
        return self._short_conv(bcv, self._taps, self._bias, self.state.conv, ctx.steps)


class Lfm2DecoderLayer(MixedDecoderLayer):
    """A convolution or attention, then an MLP."""

    __slots__ = ()

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> ShortConv:
        return ShortConv(config, layer, weights, ops)


class Lfm2ForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "conv_L_cache": 3,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    }
    layer_class: ClassVar[Callable[..., Any]] = Lfm2DecoderLayer
    file_names: ClassVar[Mapping[str, str]] = {
        r"input_layernorm": "operator_norm",
        r"post_attention_layernorm": "ffn_norm",
        r"self_attn\.o_proj": "self_attn.out_proj",
        r"self_attn\.(q|k)_norm": r"self_attn.\1_layernorm",
        r"mlp\.gate_proj": "feed_forward.w1",
        r"mlp\.up_proj": "feed_forward.w3",
        r"mlp\.down_proj": "feed_forward.w2",
        r"model\.norm\.": "model.embedding_norm.",
    }

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**lfm2_fields(hf), intermediate_size=_mlp_size(hf))


def lfm2_fields(hf: HfConfig) -> dict[str, Any]:
    """Shared parts of both kinds of LFM2."""
    types = hf.values.get("layer_types")
    if types is None:
        full = hf.values.get("full_attn_idxs")
        layers = range(hf.num_layers)
        types = ["full_attention" if full is None or i in full else "conv" for i in layers]
    tied = hf.values.get("tie_embedding", hf.values["tie_word_embeddings"])
    return {
        "qk_norm": True,
        "rms_norm_eps": hf.float("norm_eps"),
        "tie_word_embeddings": bool(tied),
        "layer_kinds": layer_kinds(types, {"full_attention": "attention", "conv": "state"}),
        "state": StateShape((hf.int("hidden_size"), hf.int("conv_L_cache") - 1)),
    }


def _mlp_size(hf: HfConfig) -> int:
    size = hf.int("block_ff_dim", hf.int("intermediate_size"))
    if hf.bool("block_auto_adjust_ff_dim"):
        unit = hf.int("block_multiple_of")
        size = int(2 * size / 3)
        size = -(-int(hf.float("block_ffn_dim_multiplier") * size) // unit) * unit
    return size
