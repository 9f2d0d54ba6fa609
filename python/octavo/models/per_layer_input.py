"""PerLayerEmbedding: vectors of a token for each layer by itself, as Gemma 3n and 4 have them.

A layer's vector is that of the token's id in a table of its own, and a projection of the token's
embedding; late in the layer a gate of the residual weighs it (``PerLayerGate``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.norm import RMSNorm
from octavo.models.config import ModelConfig
from octavo.models.parts import layer_norms, load_linear, load_table


class PerLayerEmbedding:
    """Every layer's vectors of a step's tokens."""

    __slots__ = ("_norm", "_project", "_scale", "_size", "_table", "_vocab_size")

    def __init__(self, config: ModelConfig, weights: Weights, ops: OpSet) -> None:
        size, vocab_size = config.per_layer_size, config.per_layer_vocab
        d, width = config.hidden_size, config.num_layers * size
        self._size, self._vocab_size, self._scale = size, vocab_size, d**-0.5
        # In the activations' type, as it was in training.
        scale = torch.tensor(size**0.5, dtype=weights.act_dtype).item()
        shape = (vocab_size, width)
        self._table = load_table("model.embed_tokens_per_layer", shape, weights, ops, scale)
        parts = {"model.per_layer_model_projection": width}
        self._project = load_linear(parts, d, False, weights, ops)
        weight = weights.vector("model.per_layer_projection_norm.weight", size)
        self._norm = RMSNorm(ops, weight, config.rms_norm_eps)

    def __call__(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """ids int32 [T] and their embeddings [T, D] -> [T, L * size]."""
        # Ids beyond the table are those of other parts.
        rows = self._table(torch.where(ids < self._vocab_size, ids, 0))
        projected = (self._project(embedded) * self._scale).view(-1, self._size)
        return (self._norm(projected).view(rows.shape) + rows) * 2**-0.5


def of_layers(vectors: Tensor, layers: range, size: int) -> Tensor:
    """The vectors of some layers, [len(layers), T, size], of all layers', [T, L * size]."""
    own = vectors.view(len(vectors), -1, size)[:, layers.start : layers.stop]
    return own.transpose(0, 1).contiguous()


class PerLayerGate:
    """norm(projection(act(gate(x)) * the layer's vectors))."""

    __slots__ = ("_act", "_activation", "_gate", "_norm", "_project")

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, ops: OpSet) -> None:
        prefix, d, size = f"model.layers.{layer}", config.hidden_size, config.per_layer_size
        gate, projection = f"{prefix}.per_layer_input_gate", f"{prefix}.per_layer_projection"
        self._gate = load_linear({gate: size}, d, False, weights, ops)
        self._project = load_linear({projection: d}, size, False, weights, ops)
        self._norm = layer_norms(config, layer, weights, ops)("post_per_layer_input_norm")
        self._activation: Callable[[Tensor, str], Tensor] = ops.activation
        self._act = config.hidden_act

    def __call__(self, x: Tensor, vectors: Tensor) -> Tensor:
        """x [T, D], vectors [T, size] -> [T, D]."""
        return self._norm(self._project(self._activation(self._gate(x), self._act) * vectors))
