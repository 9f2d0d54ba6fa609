"""PhiForCausalLM, Phi-1, 1.5 and 2: attention and MLP side by side on one layer norm.

Every projection has a bias, the output head too; the rotary embedding turns part of a head.
"""

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
    make_attention,
)
from octavo.models.parts import heads_of, load_columns, load_layer_norm, load_rows


class PhiDecoderLayer:
    """x + attention(norm(x)) + mlp(norm(x))."""

    __slots__ = ("attention", "dense", "mlp", "norm", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}"
        d = config.hidden_size
        self.norm = load_layer_norm(f"{prefix}.input_layernorm", config, weights, ops)
        heads = heads_of(config, ops.rank)
        qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        named = {f"{prefix}.self_attn.{name}": rows for name, rows in qkv.items()}
        ranges = (heads.q_rows, heads.kv_rows, heads.kv_rows)
        self.qkv_proj = load_columns(named, d, True, weights, ops, ranges)
        self.attention = make_attention(config, cos_sin, ops)
        dense = f"{prefix}.self_attn.dense"
        self.dense = load_rows(dense, d, config.q_size, True, weights, ops, heads.q_rows)
        mlp = (f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2")
        self.mlp = UngatedMLP(mlp, config, True, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm.add(x, residual)
        attended = self.dense(self.attention(self.qkv_proj(x), ctx))
        return attended + self.mlp(x), residual


class PhiForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
    }
    layer_class: ClassVar[Callable[..., Layer]] = PhiDecoderLayer
    norm_name: ClassVar[str] = "model.final_layernorm"
    head_bias: ClassVar[bool] = True

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        if hf.bool("qk_layernorm"):
            raise ModelLoadError("config.json: qk_layernorm is not supported")
        return hf.config(rms_norm_eps=hf.float("layer_norm_eps", 1e-5))
