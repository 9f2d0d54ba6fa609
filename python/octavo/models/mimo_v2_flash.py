"""MiMoV2FlashForCausalLM: local layers with sinks and more heads, and values narrower than keys.

The experts are DeepSeek V3's without a shared one. In the cache values are as wide as keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Rows
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import KVShape, ModelConfig
from octavo.models.glm4_moe import Glm4MoeDecoderLayer, deepseek_fields
from octavo.models.hf_config import HfConfig
from octavo.models.llama import DecoderLayer, LlamaForCausalLM
from octavo.models.parts import heads_of, load_columns, load_rows

_ROPE = {"rope_type": "default", "partial_rotary_factor": 0.334}
_DEFAULTS: Mapping[str, Any] = {
    "attention_value_scale": 0.707,
    "head_dim": 192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "full_attention": {**_ROPE, "rope_theta": 5000000.0},
        "sliding_attention": {**_ROPE, "rope_theta": 10000.0},
    },
    "sliding_window": 129,
    "v_head_dim": 128,
}


class MiMoAttention:
    """Projections, attention, output projection."""

    __slots__ = ("_sizes", "_value_scale", "attention", "o_proj", "qkv_proj")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        hf, prefix = HfConfig(config.raw, _DEFAULTS), f"model.layers.{layer}.self_attn"
        config = config.at_layer(layer)
        d, bias, width = config.hidden_size, config.attention_bias, hf.int("v_head_dim")
        heads = heads_of(config, ops.rank)
        rows = {"q_proj": config.q_size, "k_proj": config.kv_size}
        rows["v_proj"] = config.num_kv_heads * width
        value_rows, value_columns = (
            (begin * width, end * width) for begin, end in (heads.kv, heads.q)
        )
        ranges = (heads.q_rows, heads.kv_rows, value_rows)
        parts = {f"{prefix}.{name}": size for name, size in rows.items()}
        self.qkv_proj = load_columns(parts, d, bias, weights, ops, ranges)
        inputs = config.num_heads * width
        self.o_proj = load_rows(f"{prefix}.o_proj", d, inputs, False, weights, ops, value_columns)
        sinks = None
        if config.sliding_window(layer):
            part = Rows((heads.q,)) if ops.rank.size > 1 else None
            name = f"{prefix}.attention_sink_bias"
            sinks = weights.vector(name, config.num_heads, part).float()
        num_heads, num_kv_heads = heads.counts
        self._sizes = (num_heads, num_kv_heads, config.head_dim, width)
        self._value_scale = hf.float("attention_value_scale")
        self.attention = Attention(
            ops,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.head_dim,
            cos_sin=cos_sin,
            sliding_window=config.sliding_window(layer),
            sinks=sinks,
        )

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        projected, residual = self.qkv_proj.normed(x, residual, norm)
        num_heads, num_kv_heads, dim, width = self._sizes
        keys = (num_heads + num_kv_heads) * dim
        qk, values = projected.split_with_sizes([keys, num_kv_heads * width], -1)
        values = values.reshape(-1, num_kv_heads, width) * self._value_scale
        values = torch.nn.functional.pad(values, (0, dim - width)).flatten(1)
        out = self.attention(torch.cat((qk, values), 1), ctx)
        # A copy where a rank has one head, too.
        out = out.view(-1, num_heads, dim)[..., :width].flatten(1).contiguous()
        return self.o_proj.add(out, residual)


class MiMoDecoderLayer(Glm4MoeDecoderLayer):
    """Attention, then experts or, in the first layer, an MLP."""

    __slots__ = ()

    attention_class = MiMoAttention


class MiMoV2FlashForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    other_parts: ClassVar[tuple[str, ...]] = ("model.mtp.",)
    layer_class: ClassVar[Callable[..., DecoderLayer]] = MiMoDecoderLayer

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        if hf.int("v_head_dim") > hf.head_dim:
            raise ModelLoadError("config.json: v_head_dim is beyond head_dim")
        count, kv = hf.num_layers, hf.int("num_key_value_heads")
        types = hf.values.get("layer_types") or [
            "full_attention" if layer == 0 or (layer + 1) % 6 == 0 else "sliding_attention"
            for layer in range(count)
        ]
        kinds = hf.values.get("mlp_layer_types") or ["dense", *["sparse"] * (count - 1)]
        local_kv = hf.int("swa_num_key_value_heads", 2 * kv)
        is_local = [kind == "sliding_attention" for kind in types]
        fields = deepseek_fields(hf)
        fields["moe_layers"] = tuple(kind == "sparse" for kind in kinds)
        return hf.config(
            **fields,
            attention_bias=hf.bool("attention_bias"),
            rope=hf.rope("full_attention"),
            local_rope=hf.rope("sliding_attention"),
            sliding_windows=tuple(hf.int("sliding_window") if local else 0 for local in is_local),
            kv_shapes=tuple(KVShape(local_kv if local else kv, hf.head_dim) for local in is_local),
        )
