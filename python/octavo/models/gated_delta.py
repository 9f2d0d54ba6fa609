"""GatedDeltaNet: attention's place taken by the gated delta rule, as in Qwen3-Next and OLMo Hybrid.

Query, key and value go through a causal convolution; one decay and one write strength a head follow
from the same input, and the result is normed per head and gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.opset import OpSet
from octavo.kernels.rank import Rank
from octavo.kernels.weights import Part, Range, Rows, Stored
from octavo.layers.context import LayerState, StepContext
from octavo.layers.linear import Linear
from octavo.layers.norm import Addend, RMSNorm
from octavo.models.config import ModelConfig, StateShape
from octavo.models.hf_config import HfConfig
from octavo.models.hybrid import NO_STATE, load_taps, recurrent_ops
from octavo.models.parts import grouped_heads, load_rows, scaled


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Numbers of key heads and value heads, their sizes, and the convolution's width."""

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    width: int

    @staticmethod
    def of(state: StateShape) -> DeltaShape:
        """The shape whose state this is."""
        assert state.recurrent is not None
        (_, past), (heads, key_dim, value_dim) = state.conv, state.recurrent
        return DeltaShape(state.groups, heads, key_dim, value_dim, past + 1)

    @property
    def keys(self) -> int:
        """Width of all queries, and of all keys."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.num_heads * self.value_dim

    @property
    def state(self) -> StateShape:
        """The state that a layer keeps of one request."""
        conv = (2 * self.keys + self.values, self.width - 1)
        recurrent = (self.num_heads, self.key_dim, self.value_dim)
        return StateShape(conv, recurrent, self.num_key_heads)


def delta_shape(hf: HfConfig, **defaults: int) -> DeltaShape:
    """The ``linear_...`` keys of a config.json; those that it may leave out have a default."""

    def size(name: str) -> int:
        return hf.int(f"linear_{name}", defaults.get(name))

    return DeltaShape(
        size("num_key_heads"),
        size("num_value_heads"),
        size("key_head_dim"),
        size("value_head_dim"),
        size("conv_kernel_dim"),
    )


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """A rank's key heads and value heads, each [begin, end), of a layer's ``shape``."""

    shape: DeltaShape
    keys: Range
    values: Range

    @staticmethod
    def of(shape: DeltaShape, rank: Rank) -> DeltaHeads:
        """The heads of one rank."""
        values, keys = grouped_heads(shape.num_heads, shape.num_key_heads, rank)
        return DeltaHeads(shape, keys, values)

    @property
    def own_shape(self) -> DeltaShape:
        """Of these heads alone."""
        num_keys, num_values = self.keys[1] - self.keys[0], self.values[1] - self.values[0]
        return replace(self.shape, num_key_heads=num_keys, num_heads=num_values)

    def key_rows(self, offset: int = 0) -> Range:
        """Rows from ``offset`` on of all queries, or of all keys."""
        return scaled(self.keys, self.shape.key_dim, offset)

    def value_rows(self, offset: int = 0) -> Range:
        """Rows from ``offset`` on of all values."""
        return scaled(self.values, self.shape.value_dim, offset)

    def tiled_values(self) -> list[int]:
        """Its value heads in the order of files that have the first of every key head, then the
        second, and so on."""
        ratio = self.shape.num_heads // self.shape.num_key_heads
        return sorted(range(*self.values), key=lambda head: (head % ratio, head // ratio))

    def tiled_rows(self) -> list[Range]:
        """Rows of all values of such a file, as few ranges as they are."""
        ratio = self.shape.num_heads // self.shape.num_key_heads
        ranges: list[Range] = []
        for head in self.tiled_values():
            place = head % ratio * self.shape.num_key_heads + head // ratio
            begin, end = scaled((place, place + 1), self.shape.value_dim)
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, end))
        return ranges

    def channels(self) -> tuple[Range, Range, Range]:
        """Rows of all queries, keys and values below each other."""
        keys = self.shape.keys
        return self.key_rows(), self.key_rows(keys), self.value_rows(2 * keys)

    def part(self, *ranges: Range) -> Rows | None:
        """These rows; None where they are all."""
        is_whole = self.own_shape == self.shape
        return None if is_whole else Rows(ranges)


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """The projections of a layer's input, each one or several modules: (prefix, rows, part).

    ``qkvz``: queries, keys, values and the gate; ``ba``: write strengths and decays. ``part``: a
    rank's rows, in their order here. ``tiles_values``: the output projection takes value heads as
    ``DeltaHeads.tiled_values`` has them.
    """

    qkvz: Sequence[tuple[str, int, Part]]
    ba: Sequence[tuple[str, int, Part]]
    tiles_values: bool = False


class GatedDeltaNet:
    """See the module doc. ``names``: of the layer's norm and output projection below ``prefix``."""

    __slots__ = (
        "_ba",
        "_beta_scale",
        "_decay",
        "_dt_bias",
        "_eps",
        "_norm",
        "_ops",
        "_order",
        "_qkvz",
        "_shape",
        "_taps",
        "out_proj",
        "state",
    )

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        own: DeltaHeads,
        inputs: DeltaInputs,
        weights: Weights,
        ops: OpSet,
        *,
        names: tuple[str, str] = ("norm", "out_proj"),
        norm_eps: float | None = None,
        beta_scale: float = 1.0,
    ) -> None:
        d, shape = config.hidden_size, own.shape
        norm, out = names

        def read(parts: Sequence[tuple[str, int, Part]]) -> list[Stored]:
            return [weights.linear(f"{prefix}.{name}", (n, d), part) for name, n, part in parts]

        qkvz, ba = read(inputs.qkvz), read(inputs.ba)
        # One product of the input where all is of one format; many quantized files leave the narrow
        # ones dense.
        self._ba: Linear | None = None
        if len({"" if isinstance(part, Tensor) else part.format for part in qkvz + ba}) == 1:
            qkvz += ba
        else:
            self._ba = Linear(ops, ba)
        self._qkvz = Linear(ops, qkvz)
        self._taps = self._load_taps(prefix, own, weights)

        def per_head(name: str) -> Tensor:
            part = own.part(own.values)
            return weights.vector(f"{prefix}.{name}", shape.num_heads, part).float()

        self._decay, self._dt_bias = -torch.exp(per_head("A_log")), per_head("dt_bias")
        self._norm = weights.vector(f"{prefix}.{norm}.weight", shape.value_dim)
        self._eps = config.rms_norm_eps if norm_eps is None else norm_eps
        self._beta_scale = beta_scale
        tiles = inputs.tiles_values and shape.num_heads > shape.num_key_heads
        columns = own.tiled_rows() if tiles else [own.value_rows()]
        self.out_proj = load_rows(f"{prefix}.{out}", d, shape.values, False, weights, ops, *columns)
        self._order: Tensor | None = None
        if tiles:
            # A quantized matrix keeps its columns: what it multiplies comes in their order.
            heads = torch.tensor(own.tiled_values()) - own.values[0]
            elements = heads[:, None] * shape.value_dim + torch.arange(shape.value_dim)
            self._order = elements.flatten().to(self._dt_bias.device)
        self._shape, self._ops = own.own_shape, recurrent_ops(ops)
        self.state: LayerState = NO_STATE

    @property
    def state_shape(self) -> StateShape:
        """Of the rank's heads."""
        return self._shape.state

    @staticmethod
    def _load_taps(prefix: str, own: DeltaHeads, weights: Weights) -> Tensor:
        """Those of queries, keys and values."""
        name, channels = f"{prefix}.conv1d.weight", own.shape.state.conv[0]
        return load_taps(name, channels, own.shape.width, weights, own.part(*own.channels()))

    def normed(
        self, x: Addend, residual: Tensor, norm: RMSNorm, ctx: StepContext
    ) -> tuple[Addend, Tensor]:
        """(addend, residual) after norm(residual + x) has gone through this; see ``Linear``."""
        heads, channels = self._shape.num_heads, self.state.conv.shape[1]
        sizes = [channels, self._shape.values, heads, heads]
        if self._ba is None:
            projected, residual = self._qkvz.normed(x, residual, norm)
            qkv, z, b, a = projected.split_with_sizes(sizes, -1)
        else:
            normed, residual = norm.add(x, residual)
            qkv, z = self._qkvz(normed).split_with_sizes(sizes[:2], -1)
            b, a = self._ba(normed).split_with_sizes(sizes[2:], -1)
        assert self.state.recurrent is not None
        steps = ctx.steps
        qkv = self._ops.causal_conv(
            qkv, self._taps, None, self.state.conv, steps, activation="silu"
        )
        y = self._ops.gated_delta_rule(
            qkv,
            a,
            b,
            self._decay,
            self._dt_bias,
            self.state.recurrent,
            steps,
            num_key_heads=self._shape.num_key_heads,
            beta_scale=self._beta_scale,
        )
        y = self._ops.gated_norm(
            y, z, self._norm, self._eps, group_size=self._shape.value_dim, gate_first=False
        )
        return self.out_proj.add(y if self._order is None else y[:, self._order], residual)
