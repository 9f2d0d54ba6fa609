"""Layers that most decoders load alike, whole or a rank's part: projections, norms, rotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.rank import Rank
from octavo.kernels.weights import Columns, Range, Rows, Weight, beside, share
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm, RMSNorm
from octavo.layers.rope import RopeConfig, cos_sin_table, identity_table
from octavo.models.config import KVShape, ModelConfig
from octavo.models.stage import Stage

# Elements of a quantized row that stay together: 256 in most of GGUF's kinds, 128 in many groups.
_UNITS: Final = (256, 128, 64, 32, 16, 8, 1)


@dataclass(frozen=True, slots=True)
class Heads:
    """A rank's query heads and key-value heads, each [begin, end)."""

    q: Range
    kv: Range
    head_dim: int

    @property
    def q_rows(self) -> Range:
        """Its rows of the query projection, and columns of the output projection."""
        return self.q[0] * self.head_dim, self.q[1] * self.head_dim

    @property
    def kv_rows(self) -> Range:
        """Its rows of the key projection, and of the value projection."""
        return self.kv[0] * self.head_dim, self.kv[1] * self.head_dim

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of its query heads and of its key-value heads."""
        return self.q[1] - self.q[0], self.kv[1] - self.kv[0]

    @property
    def sizes(self) -> list[int]:
        """Widths of its queries, keys and values."""
        return [end - begin for begin, end in (self.q_rows, self.kv_rows, self.kv_rows)]


def heads_of(config: ModelConfig, rank: Rank) -> Heads:
    """The heads of one rank. Where there are fewer key-value heads than ranks, several ranks hold
    the same one; ``split.check_split`` has seen that the numbers divide."""
    return Heads(*grouped_heads(config.num_heads, config.num_kv_heads, rank), config.head_dim)


def grouped_heads(num_heads: int, num_groups: int, rank: Rank) -> tuple[Range, Range]:
    """A rank's heads, and the groups that these are of; several ranks may hold the same group."""
    own = share(num_heads, rank.rank, rank.size)
    if num_groups >= rank.size:
        return own, share(num_groups, rank.rank, rank.size)
    first = rank.rank * num_groups // rank.size
    return own, (first, first + 1)


def scaled(own: Range, size: int, offset: int = 0) -> Range:
    """Rows from ``offset`` on of units that have ``size`` rows each."""
    return offset + own[0] * size, offset + own[1] * size


def part_config(config: ModelConfig, rank: Rank, stage: Stage) -> ModelConfig:
    """The shape of one rank's part of a stage: its heads and layers.

    What a layer reads of another's is of the same stage (``stage.stages_of``).
    """
    first, last = stage.layers.start, stage.layers.stop
    part = config.replace(
        num_layers=len(stage.layers),
        layer_kinds=config.layer_kinds[first:last],
        kv_sources=tuple(source - first for source in config.kv_sources[first:last]),
    )
    if not any(config.kv_layers):
        return part  # without attention there are no heads to split
    num_heads, num_kv_heads = heads_of(config, rank).counts
    shapes = tuple(
        KVShape(heads_of(config.at_layer(layer), rank).counts[1], config.kv_shapes[layer].head_dim)
        for layer in (stage.layers if config.kv_shapes else ())
    )
    return part.replace(num_heads=num_heads, num_kv_heads=num_kv_heads, kv_shapes=shapes)


def width_of(size: int, rank: Rank) -> Range:
    """A rank's units of an MLP's ``size``, between the largest blocks that ``size`` is made of."""
    unit = next(u for u in _UNITS if size % u == 0 and (u == 1 or size // u >= rank.size))
    return share(size, rank.rank, rank.size, unit)


def load_linear(
    parts: Mapping[str, int], inputs: int, bias: bool, weights: Weights, ops: OpSet
) -> Linear:
    """A projection that no mesh splits, its rows stacked from ``parts``: prefix -> rows.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """
    return load_columns(parts, inputs, bias, weights, ops, [(0, rows) for rows in parts.values()])


def load_columns(
    parts: Mapping[str, int] | Mapping[str, int | list[int]],
    inputs: int,
    bias: bool,
    weights: Weights,
    ops: OpSet,
    ranges: Sequence[Range],
) -> Linear:
    """A projection whose outputs are split over the ranks.

    parts: prefix -> rows of the whole tensor, or of each projection that is fused in it.
    ranges: this rank's rows of each projection, in order.

    Raises:
        ModelLoadError: a weight is missing or has another shape.
    """
    left = iter(ranges)
    stored, biases = [], []
    for prefix, sizes in parts.items():
        begin, pieces = 0, []
        for size in [sizes] if isinstance(sizes, int) else sizes:
            first, last = next(left)
            pieces.append((begin + first, begin + last))
            begin += size
        part = Rows(tuple(pieces)) if ops.rank.size > 1 else None
        stored.append(weights.linear(prefix, (begin, inputs), part))
        if bias:
            biases.append(weights.vector(f"{prefix}.bias", begin, part))
    return Linear(ops, stored, torch.cat(biases) if biases else None)


def load_rows(
    prefix: str,
    outputs: int,
    inputs: int,
    bias: bool,
    weights: Weights,
    ops: OpSet,
    *columns: Range,
) -> Linear:
    """A projection whose inputs are split over the ranks; ``columns``: this rank's, in order.

    Raises:
        ModelLoadError: a weight is missing, has another shape, or cannot be cut there.
    """
    parts = [Columns(*own) for own in columns] if ops.rank.size > 1 else [None]
    stored = beside([weights.linear(prefix, (outputs, inputs), part) for part in parts])
    vector = weights.vector(f"{prefix}.bias", outputs) if bias else None
    return Linear(ops, [stored], vector, partial=True)


def load_vocabulary(
    prefix: str, config: ModelConfig, weights: Weights, ops: OpSet, scale: float = 1.0
) -> Embedding:
    """The embedding ``prefix``, whose rows are split over the ranks.

    Raises:
        ModelLoadError: it is missing or has another shape.
    """
    return load_table(prefix, (config.vocab_size, config.hidden_size), weights, ops, scale)


def load_table(
    prefix: str, shape: tuple[int, int], weights: Weights, ops: OpSet, scale: float = 1.0
) -> Embedding:
    """The embedding ``prefix`` of a shape of its own. Split and raises as ``load_vocabulary``."""
    rows = share(shape[0], ops.rank.rank, ops.rank.size)
    part = None if ops.rank.size == 1 else Rows((rows,))
    table = weights.embedding(prefix, shape, part)
    return Embedding(ops, table, weights.act_dtype, scale, rows)


def load_head(
    tied: Weight | None,
    config: ModelConfig,
    weights: Weights,
    ops: OpSet,
    *,
    has_bias: bool = False,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> LMHead:
    """The output head: ``tied``, the embedding's weight, or else ``lm_head``; split as that is.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    rows = vocabulary_of(config, ops.rank)
    part = None if ops.rank.size == 1 else Rows((rows,))
    head = tied
    if head is None:
        shape = (config.vocab_size, config.hidden_size)
        head = ops.weight([weights.linear("lm_head", shape, part)])
    bias = weights.vector("lm_head.bias", config.vocab_size, part) if has_bias else None
    return LMHead(ops, head, config.vocab_size, softcap, scale=scale, bias=bias)


def vocabulary_of(config: ModelConfig, rank: Rank) -> Range:
    """A rank's rows of the embedding and of the output head."""
    return share(config.vocab_size, rank.rank, rank.size)


def layer_norms(
    config: ModelConfig, layer: int, weights: Weights, ops: OpSet
) -> Callable[[str], RMSNorm]:
    """A function that loads the RMSNorms [D] of one layer by name."""

    def norm(name: str) -> RMSNorm:
        weight = weights.vector(f"model.layers.{layer}.{name}.weight", config.hidden_size)
        return RMSNorm(ops, weight, config.rms_norm_eps, config.norm_weight_offset)

    return norm


def load_layer_norm(
    prefix: str, config: ModelConfig, weights: Weights, ops: OpSet, *, has_bias: bool = True
) -> LayerNorm:
    """The LayerNorm [D] ``prefix``.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    weight = weights.vector(f"{prefix}.weight", config.hidden_size)
    bias = weights.vector(f"{prefix}.bias", config.hidden_size) if has_bias else None
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
