"""OlmoHybridForCausalLM: the gated delta rule in most layers, OLMo 2's attention layers between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.checkpoints.weights import RenamedWeights, Weights
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.gated_delta import (
    DeltaHeads,
    DeltaInputs,
    DeltaShape,
    GatedDeltaNet,
    delta_shape,
)
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import HybridForCausalLM, layer_kinds, load_taps
from octavo.models.llama import LlamaMLP
from octavo.models.olmo2 import Olmo2DecoderLayer
from octavo.models.parts import layer_norms
from octavo.models.qwen3_next import KINDS, every_fourth

# Of the norm after the rule, whatever the config's is.
_NORM_EPS = 1e-5


class OlmoDeltaNet(GatedDeltaNet):
    """The rule with a convolution each for queries, keys and values."""

    __slots__ = ()

    @staticmethod
    def _load_taps(prefix: str, own: DeltaHeads, weights: Weights) -> Tensor:
        shape, keys = own.shape, own.part(own.key_rows())
        parts = {
            "q": (shape.keys, keys),
            "k": (shape.keys, keys),
            "v": (shape.values, own.part(own.value_rows())),
        }
        return torch.cat(
            [
                load_taps(f"{prefix}.{name}_conv1d.weight", size, shape.width, weights, part)
                for name, (size, part) in parts.items()
            ]
        )


class OlmoDeltaLayer:
    """The delta rule and an MLP, each after a norm and added to the residual."""

    __slots__ = ("attention_norm", "feedforward_norm", "mlp", "recurrence")

    attention: Attention | None = None

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        assert config.state is not None
        own = DeltaHeads.of(DeltaShape.of(config.state), ops.rank)
        shape = own.shape
        keys, values = own.part(own.key_rows()), own.part(own.value_rows())
        norm = layer_norms(config, layer, weights, ops)
        self.attention_norm = norm("attention_layer_norm")
        self.recurrence = OlmoDeltaNet(
            config,
            f"model.layers.{layer}.linear_attn",
            own,
            DeltaInputs(
                [
                    ("q_proj", shape.keys, keys),
                    ("k_proj", shape.keys, keys),
                    ("v_proj", shape.values, values),
                    ("g_proj", shape.values, values),
                ],
                [(name, shape.num_heads, own.part(own.values)) for name in ("b_proj", "a_proj")],
            ),
            weights,
            ops,
            names=("o_norm", "o_proj"),
            norm_eps=_NORM_EPS,
            # Twice the strength turns an eigenvalue of the transition negative.
            beta_scale=2.0 if config.raw.get("linear_allow_neg_eigval", True) else 1.0,
        )
        self.feedforward_norm = norm("feedforward_layer_norm")
        self.mlp = LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.recurrence.normed(x, residual, self.attention_norm, ctx)
        return self.mlp.normed(x, residual, self.feedforward_norm)


class OlmoAttentionLayer(Olmo2DecoderLayer):
    """OLMo 2's, without a state."""

    __slots__ = ()

    recurrence = None

    @property
    def attention(self) -> Attention:
        """The layer's attention, which keeps keys and values."""
        return self.self_attn.attention


def make_layer(
    config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
) -> OlmoDeltaLayer | OlmoAttentionLayer:
    """One layer of either kind."""
    if config.state_layers[layer]:
        return OlmoDeltaLayer(config, layer, weights, ops)
    if f"model.layers.{layer}.post_attention_layernorm.weight" not in weights.unread():
        # As transformers writes it: with the names of the other kind's.
        weights = RenamedWeights(
            weights, lambda name: name.replace("post_attention_layernorm", "feedforward_layer_norm")
        )
    return OlmoAttentionLayer(config, layer, cos_sin, weights, ops)


class OlmoHybridForCausalLM(HybridForCausalLM):
    """See LlamaForCausalLM."""

    hf_defaults: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 65536}
    layer_class: ClassVar[Callable[..., Any]] = staticmethod(make_layer)

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        bias, heads = hf.bool("attention_bias"), hf.int("num_attention_heads")
        num_key_heads = hf.int("linear_num_key_heads", heads)
        key_dim = hf.int(
            "linear_key_head_dim", int(0.75 * hf.int("hidden_size") / max(num_key_heads, 1))
        )
        shape = delta_shape(
            hf,
            num_key_heads=num_key_heads,
            num_value_heads=heads,
            key_head_dim=key_dim,
            value_head_dim=2 * key_dim,
            conv_kernel_dim=4,
        )
        # Without a base there are no rotations.
        rope = hf.values.get("rope_parameters") or {}
        rotates = rope.get("rope_theta") is not None or "rope_theta" in hf.values
        return hf.config(
            attention_bias=bias,
            attention_out_bias=bias,
            layer_kinds=layer_kinds(every_fourth(hf), KINDS),
            rope_layers=() if rotates else (False,) * hf.num_layers,
            state=shape.state,
        )
