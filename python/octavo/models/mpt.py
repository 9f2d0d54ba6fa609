"""MptForCausalLM: ALiBi in place of rope, and no bias anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.layer_norm_decoder import (
    Layer,
    LayerNormDecoder,
    UngatedMLP,
    alibi_slopes,
    make_attention,
)
from octavo.models.parts import heads_of, load_columns, load_layer_norm, load_rows

# Settings of attention whose other values no released model has, and which nothing here computes.
_FIXED = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
}


class MptDecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    __slots__ = ("attention", "mlp", "norm_1", "norm_2", "out_proj", "qkv")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix, d = f"transformer.blocks.{layer}", config.hidden_size
        self.norm_1, self.norm_2 = (
            load_layer_norm(f"{prefix}.norm_{i}", config, weights, ops, has_bias=False)
            for i in (1, 2)
        )
        heads = heads_of(config, ops.rank)
        fused: dict[str, int | list[int]] = {f"{prefix}.attn.Wqkv": [d, d, d]}
        self.qkv = load_columns(fused, d, False, weights, ops, (heads.q_rows,) * 3)
        slopes = alibi_slopes(config.num_heads)
        self.attention = make_attention(config, cos_sin, ops, slopes=slopes)
        self.out_proj = load_rows(
            f"{prefix}.attn.out_proj", d, d, False, weights, ops, heads.q_rows
        )
        mlp = (f"{prefix}.ffn.up_proj", f"{prefix}.ffn.down_proj")
        self.mlp = UngatedMLP(mlp, config, False, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm_1.add(x, residual)
        attended = self.out_proj(self.attention(self.qkv(x), ctx))
        x, residual = self.norm_2.add(attended, residual)
        return self.mlp(x), residual


class MptForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    layer_class: ClassVar[Callable[..., Layer]] = MptDecoderLayer
    embedding_name: ClassVar[str] = "transformer.wte"
    norm_name: ClassVar[str] = "transformer.norm_f"
    norm_bias: ClassVar[bool] = False

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        attention = dict(hf.values.get("attn_config") or {})
        for key, value in _FIXED.items():
            if attention.get(key, value) != value:
                raise ModelLoadError(f"config.json: {key} {attention[key]} is not supported")
        if hf.values.get("logit_scale") is not None:
            raise ModelLoadError("config.json: logit_scale is not supported")
        return hf.config(
            num_kv_heads=hf.int("num_attention_heads"),
            intermediate_size=4 * hf.int("hidden_size"),
            hidden_act="gelu",
            attention_scale=attention.get("softmax_scale"),
            rms_norm_eps=hf.float("layer_norm_epsilon", 1e-5),
            rope_layers=(False,) * hf.num_layers,
        )
