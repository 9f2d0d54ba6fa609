"""DeepseekV3ForCausalLM, V3, R1 and Kimi K2: latent attention, and GLM-4.5's experts.

Of a layer's keys and values the cache holds one latent row a token, for all heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Rows, dense
from octavo.layers.context import StepContext
from octavo.layers.latent_attention import LatentAttention
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import LatentDims, ModelConfig
from octavo.models.glm4_moe import Glm4MoeDecoderLayer, deepseek_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaForCausalLM
from octavo.models.parts import (
    heads_of,
    load_columns,
    load_linear,
    load_rows,
)

# Of the norms of latents, whatever the config says of the others.
_LATENT_EPS = 1e-6


class DeepseekAttention:
    """Queries, the latent and its rotated key; attention; output projection."""

    __slots__ = ("_kv_a", "_kv_norm", "_q", "_q_a", "_q_norm", "_sizes", "attention", "o_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        prefix, dims = f"model.layers.{layer}.self_attn", config.latent
        assert dims is not None
        d, rank, bias = config.hidden_size, dims.kv_rank, config.attention_bias
        begin, end = heads_of(config, ops.rank).q
        query = dims.nope_dim + dims.rope_dim
        self._sizes = (end - begin, query, rank)

        def norm(name: str, size: int) -> RMSNorm:
            weight = weights.vector(f"{prefix}.{name}.weight", size)
            return RMSNorm(ops, weight, _LATENT_EPS)

        self._q_a = self._q_norm = None
        name, inputs = "q_proj", d
        if dims.q_rank:
            name, inputs = "q_b_proj", dims.q_rank
            self._q_a = load_linear({f"{prefix}.q_a_proj": inputs}, d, bias, weights, ops)
            self._q_norm = norm("q_a_layernorm", inputs)
        rows = {f"{prefix}.{name}": config.num_heads * query}
        ranges = [(begin * query, end * query)]
        self._q = load_columns(rows, inputs, False, weights, ops, ranges)
        kv_a = {f"{prefix}.kv_a_proj_with_mqa": rank + dims.rope_dim}
        self._kv_a = load_linear(kv_a, d, bias, weights, ops)
        self._kv_norm = norm("kv_a_layernorm", rank)
        w_k, w_v = _unfolding(f"{prefix}.kv_b_proj", config, dims, (begin, end), weights, ops)
        self.attention = LatentAttention(
            ops,
            w_k,
            w_v,
            cos_sin=cos_sin,
            scale=config.attention_scale or query**-0.5,
            interleaved=config.interleaved_rope,
        )
        width, own = (
            config.num_heads * dims.value_dim,
            (begin * dims.value_dim, end * dims.value_dim),
        )
        self.o_proj = load_rows(f"{prefix}.o_proj", d, width, bias, weights, ops, own)

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        x, residual = norm.add(x, residual)
        num_heads, query, rank = self._sizes
        compressed = self._kv_a(x)
        latent = self._kv_norm(compressed[:, :rank].contiguous())
        if self._q_a is not None and self._q_norm is not None:
            x = self._q_norm(self._q_a(x))
        q = self._q(x).view(-1, num_heads, query)
        return self.o_proj.add(self.attention(q, latent, compressed[:, rank:], ctx), residual)


def _unfolding(
    prefix: str,
    config: ModelConfig,
    dims: LatentDims,
    heads: tuple[int, int],
    weights: Weights,
    ops: OpSet,
) -> tuple[Tensor, Tensor]:
    """(w_k [H, Dn, L], w_v [H, Dv, L]) of the rank's heads, in the type of activations."""
    width = dims.nope_dim + dims.value_dim
    begin, end = heads
    part = Rows(((begin * width, end * width),)) if ops.rank.size > 1 else None
    stored = weights.linear(prefix, (config.num_heads * width, dims.kv_rank), part)
    whole = dense(stored).to(weights.act_dtype).view(end - begin, width, dims.kv_rank)
    w_k, w_v = whole.split_with_sizes([dims.nope_dim, dims.value_dim], 1)
    return w_k.contiguous(), w_v.contiguous()


class DeepseekV3DecoderLayer(Glm4MoeDecoderLayer):
    """Latent attention, then experts or an MLP."""

    __slots__ = ()

    attention_class = DeepseekAttention


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "v_head_dim": 128,
    }
    layer_class: ClassVar[Callable[..., DecoderLayer]] = DeepseekV3DecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        return hf.config(**latent_fields(hf), **deepseek_fields(hf))


def latent_fields(hf: HfConfig) -> dict[str, Any]:
    """The attention of a config.json with DeepSeek's keys."""
    # An explicit null is none, an absent one the default.
    has_q_rank = hf.raw.get("q_lora_rank", 0) is not None
    dims = LatentDims(
        q_rank=hf.int("q_lora_rank", 0) if has_q_rank else 0,
        kv_rank=hf.int("kv_lora_rank"),
        rope_dim=hf.int("qk_rope_head_dim"),
        nope_dim=hf.int("qk_nope_head_dim"),
        value_dim=hf.int("v_head_dim"),
    )
    rope = dataclasses.replace(hf.rope(partial_rotary_factor=None), rot_dim=dims.rope_dim)
    scale = (dims.nope_dim + dims.rope_dim) ** -0.5
    mscale = float(rope.scaling.get("mscale_all_dim") or 0.0)
    factor = float(rope.scaling.get("factor") or 1.0)
    if rope.rope_type != "default" and mscale and factor > 1:
        scale *= (0.1 * mscale * math.log(factor) + 1.0) ** 2
    return {
        "attention_bias": hf.bool("attention_bias"),
        "attention_scale": scale,
        "head_dim": dims.kv_rank + dims.rope_dim,
        "interleaved_rope": hf.bool("rope_interleave"),
        "latent": dims,
        "num_kv_heads": 1,
        "rope": rope,
    }
