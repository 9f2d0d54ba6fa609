"""StableLmForCausalLM: Llama with layer norms and a rotary embedding of part of a head.

StableLM 2 12B also has a layer norm for each head's query and key, and its blocks are parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Range
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, LayerNorm
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.layer_norm_decoder import Layer, LayerNormDecoder, make_attention
from octavo.models.llama import LlamaMLP
from octavo.models.parts import heads_of, load_columns, load_layer_norm, load_rows


class HeadNorm:
    """A LayerNorm without bias for each head, of weights [Dh] of its own."""

    __slots__ = ("norm", "weight")

    def __init__(
        self,
        prefix: str,
        num_heads: int,
        own: Range,
        config: ModelConfig,
        weights: Weights,
        ops: OpSet,
    ) -> None:
        """``num_heads``: of the model; ``own``: the rank's."""
        dim = config.head_dim
        if config.raw.get("stacks_head_norms"):
            rows = weights.tensor(f"{prefix}.weight", (num_heads, dim))
        else:
            names = (f"{prefix}.norms.{head}.weight" for head in range(num_heads))
            rows = torch.stack([weights.vector(name, dim) for name in names])
        self.weight = rows[slice(*own)].contiguous()
        # What all heads share; their weights come after it.
        self.norm = LayerNorm(ops, torch.ones_like(rows[0]), None, config.rms_norm_eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads * Dh] -> the same."""
        heads, dim = self.weight.shape
        normed = self.norm(x.reshape(-1, dim).contiguous()).view(-1, heads, dim)
        return (normed * self.weight).view(x.shape)


class StableLmDecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)); or both at once on one norm."""

    __slots__ = (
        "attention",
        "k_norm",
        "mlp",
        "mlp_norm",
        "norm",
        "o_proj",
        "q_norm",
        "qkv_proj",
        "sizes",
    )

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix = f"model.layers.{layer}"
        d = config.hidden_size
        self.norm = load_layer_norm(f"{prefix}.input_layernorm", config, weights, ops)
        self.mlp_norm = None
        if not config.raw.get("use_parallel_residual"):
            mlp_norm = f"{prefix}.post_attention_layernorm"
            self.mlp_norm = load_layer_norm(mlp_norm, config, weights, ops)
        heads = heads_of(config, ops.rank)
        self.sizes = heads.sizes
        names = [f"{prefix}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        whole = [config.q_size, config.kv_size, config.kv_size]
        qkv = dict(zip(names, whole, strict=True))
        ranges = (heads.q_rows, heads.kv_rows, heads.kv_rows)
        self.qkv_proj = load_columns(qkv, d, config.attention_bias, weights, ops, ranges)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            q, k = f"{prefix}.self_attn.q_layernorm", f"{prefix}.self_attn.k_layernorm"
            self.q_norm = HeadNorm(q, config.num_heads, heads.q, config, weights, ops)
            self.k_norm = HeadNorm(k, config.num_kv_heads, heads.kv, config, weights, ops)
        self.attention = make_attention(config, cos_sin, ops)
        out = f"{prefix}.self_attn.o_proj"
        self.o_proj = load_rows(out, d, config.q_size, False, weights, ops, heads.q_rows)
        self.mlp = LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.norm.add(x, residual)
        qkv = self.qkv_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split_with_sizes(self.sizes, dim=1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        attended = self.o_proj(self.attention(qkv, ctx))
        if self.mlp_norm is None:
            return attended + self.mlp(x), residual
        x, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(x), residual


class StableLmForCausalLM(LayerNormDecoder):
    """See LayerNormDecoder."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 0.25}
    layer_class: ClassVar[Callable[..., Layer]] = StableLmDecoderLayer
    norm_name: ClassVar[str] = "model.norm"

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        """The family's config.json.

        Raises:
            ModelLoadError: a value is missing or impossible.
        """
        return hf.config(
            attention_bias=hf.bool("use_qkv_bias"),
            qk_norm=hf.bool("qk_layernorm"),
            rms_norm_eps=hf.float("layer_norm_eps", 1e-5),
        )
