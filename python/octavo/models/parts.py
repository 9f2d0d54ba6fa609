"""Layers that most decoders load alike: projections, norms, rotary tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm, RMSNorm
from octavo.layers.rope import RopeConfig, cos_sin_table, identity_table
from octavo.models.config import ModelConfig


def load_linear(
    parts: Mapping[str, int], inputs: int, bias: bool, weights: Weights, ops: OpSet
) -> Linear:
    """One projection of ``inputs`` values, its rows stacked from ``parts``: prefix -> rows.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """
    stored = [weights.linear(prefix, (rows, inputs)) for prefix, rows in parts.items()]
    biases = [weights.vector(f"{prefix}.bias", rows) for prefix, rows in parts.items() if bias]
    return Linear(ops, stored, torch.cat(biases) if biases else None)


def layer_norms(
    config: ModelConfig, layer: int, weights: Weights, ops: OpSet
) -> Callable[[str], RMSNorm]:
    """A function that loads the RMSNorms [D] of one layer by name."""

    def norm(name: str) -> RMSNorm:
        weight = weights.vector(f"model.layers.{layer}.{name}.weight", config.hidden_size)
        return RMSNorm(ops, weight, config.rms_norm_eps, config.norm_weight_offset)

    return norm


def load_layer_norm(prefix: str, config: ModelConfig, weights: Weights, ops: OpSet) -> LayerNorm:
    """The LayerNorm [D] ``prefix``, with a bias.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    weight = weights.vector(f"{prefix}.weight", config.hidden_size)
    bias = weights.vector(f"{prefix}.bias", config.hidden_size)
    return LayerNorm(ops, weight, bias, config.rms_norm_eps)


def rope_tables(config: ModelConfig, max_model_len: int, device: torch.device) -> list[Tensor]:
    """Each layer's cosines and sines, float32 [max_model_len, rot]; equal ones are one tensor."""

    def table(rope: RopeConfig) -> Tensor:
        return cos_sin_table(rope, config.max_position_embeddings, max_model_len, device)

    shared = table(config.rope)
    local = shared if config.local_rope is None else table(config.local_rope)
    none = shared if all(config.rope_layers) else identity_table(max_model_len, device)
    return [
        none
        if config.rope_layers and not config.rope_layers[layer]
        else (local if config.sliding_window(layer) else shared)
        for layer in range(config.num_layers)
    ]
