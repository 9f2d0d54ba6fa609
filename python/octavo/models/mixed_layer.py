"""MixedDecoderLayer: attention or a recurrence, as the layer's kind says, then an MLP."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.attention import Attention
from octavo.layers.context import StepContext
from octavo.layers.latent_attention import LatentAttention
from octavo.layers.norm import Addend
from octavo.models.config import ModelConfig
from octavo.models.hybrid import Mixer, Recurrence
from octavo.models.llama import FeedForward, LlamaAttention, LlamaMLP
from octavo.models.parts import layer_norms


class RecurrentMixer(Mixer, Recurrence, Protocol):
    """A layer's first half that keeps a state."""


class AttentionMixer(Mixer, Protocol):
    """A layer's first half that keeps keys and values."""

    @property
    def attention(self) -> Attention | LatentAttention: ...


class MixedDecoderLayer:
    """See HybridDecoderLayer. A family makes its recurrence, and whatever else is not Llama's."""

    __slots__ = ("attention", "input_layernorm", "mixer", "mlp", "post_norm", "recurrence")

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> None:
        norm = layer_norms(config, layer, weights, ops)
        self.input_layernorm = norm("input_layernorm")
        self.attention: Attention | LatentAttention | None = None
        self.recurrence: RecurrentMixer | None = None
        self.mixer: Mixer
        if config.state_layers[layer]:
            self.mixer = self.recurrence = self.make_recurrence(config, layer, weights, ops)
        else:
            attention = self.make_attention(config, layer, cos_sin, weights, ops)
            self.mixer, self.attention = attention, attention.attention
        self.post_norm = norm("post_attention_layernorm")
        self.mlp = self.make_mlp(config, layer, weights, ops)

    @classmethod
    def make_recurrence(
        cls, config: ModelConfig, layer: int, weights: Weights, ops: OpSet
    ) -> RecurrentMixer:
        """The first half of a layer that keeps a state."""
        raise NotImplementedError

    @staticmethod
    def make_attention(
        config: ModelConfig, layer: int, cos_sin: Tensor, weights: Weights, ops: OpSet
    ) -> AttentionMixer:
        """The first half of any other layer."""
        return LlamaAttention(config, layer, cos_sin, weights, ops)

    @staticmethod
    def make_mlp(config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> FeedForward:
        """The block's second half."""
        return LlamaMLP(config, layer, weights, ops)

    def __call__(self, x: Addend, residual: Tensor, ctx: StepContext) -> tuple[Addend, Tensor]:
        x, residual = self.mixer.normed(x, residual, self.input_layernorm, ctx)
        return self.mlp.normed(x, residual, self.post_norm)
