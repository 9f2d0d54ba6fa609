"""BloomForCausalLM: ALiBi in place of rope, a norm of the embedding, and one fused projection."""

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
from octavo.models.falcon import load_fused_qkv
from octavo.models.hf_config import HfConfig
from octavo.models.layer_norm_decoder import (
    Layer,
    LayerNormDecoder,
    UngatedMLP,
    alibi_slopes,
    make_attention,
)
from octavo.models.parts import heads_of, load_layer_norm, load_rows


class BloomDecoderLayer:
    """Attention and MLP, each after a norm and added to the residual."""

    __slots__ = ("attention", "dense", "mlp", "mlp_norm", "norm", "qkv")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix, d = f"transformer.h.{layer}", config.hidden_size
        self.norm = load_layer_norm(f"{prefix}.input_layernorm", config, weights, ops)
        self.mlp_norm = load_layer_norm(f"{prefix}.post_attention_layernorm", config, weights, ops)
        self.qkv = load_fused_qkv(f"{prefix}.self_attention.query_key_value", config, weights, ops)
        slopes = alibi_slopes(config.num_heads)
        self.attention = make_attention(config, cos_sin, ops, slopes=slopes)
        dense, own = f"{prefix}.self_attention.dense", heads_of(config, ops.rank).q_rows
        self.dense = load_rows(dense, d, config.q_size, True, weights, ops, own)
        mlp = (f"{prefix}.mlp.dense_h_to_4h", f"{prefix}.mlp.dense_4h_to_h")
        self.mlp = UngatedMLP(mlp, config, True, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm.add(x, residual)
        attended = self.dense(self.attention(self.qkv(x), ctx))
        x, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(x), residual


class BloomForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    layer_class: ClassVar[Callable[..., Layer]] = BloomDecoderLayer
    embedding_name: ClassVar[str] = "transformer.word_embeddings"
    embedding_norm_name: ClassVar[str] = "transformer.word_embeddings_layernorm"
    norm_name: ClassVar[str] = "transformer.ln_f"

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        if hf.bool("apply_residual_connection_post_layernorm"):
            raise ModelLoadError(
                "config.json: apply_residual_connection_post_layernorm is not supported"
            )
        return hf.config(
            num_kv_heads=hf.int("num_attention_heads"),
            intermediate_size=4 * hf.int("hidden_size"),
            hidden_act="gelu_new",
            attention_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            rms_norm_eps=hf.float("layer_norm_epsilon", 1e-5),
            rope_layers=(False,) * hf.num_layers,
        )
