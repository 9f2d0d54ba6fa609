"""Weights: as a checkpoint stores them (Planes), and as a backend computes with them (Weight).

A loader makes dense tensors or Planes, ``OpSet.weight`` turns them into a Weight in the layout that
is fastest on its device, and the checkpoint's tensors may then be freed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .formats import gguf
from .formats.dense import DENSE_FORMATS
from .formats.format import PlaneMap
from .formats.registry import find_format
from .routing import Routing

# Elements dequantized at once: bounds the float32 copies beside the result, which on a CPU stay in
# its cache and on a GPU are large enough to hide the launches.
_CHUNKS = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Planes:
    """A quantized weight [N, K] as its checkpoint stores it.

    format: a name in formats.registry, which defines the planes.
    row_order: int64 [N]; row i of the weight is row ``row_order[i]`` of the planes. None: the
        planes' own order.
    dtype: of the dense weight that stands in for it where a backend has no kernel for its format.

    Raises:
        ValueError: an unknown format, planes that do not fit it, a row_order that is no
            permutation, or another dtype than float32, bfloat16 and float16.
    """

    format: str
    planes: PlaneMap
    shape: tuple[int, int]
    row_order: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        find_format(self.format).check(self.planes, self.shape)
        if self.dtype not in DENSE_FORMATS:
            raise ValueError(f"a dense weight is of float32, bfloat16 or float16, not {self.dtype}")
        order, n = self.row_order, self.shape[0]
        if order is not None and (
            order.dtype != torch.int64
            or order.shape != (n,)
            or not torch.equal(order.sort().values, torch.arange(n, device=order.device))
        ):
            raise ValueError(f"row_order must be an int64 permutation of {n} rows")

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes.values())

    def in_order(self) -> Planes:
        """The same weight without a row_order; copies the planes if there is one."""
        if self.row_order is None:
            return self
        planes = find_format(self.format).rows(self.planes, self.row_order)
        return replace(self, planes=planes, row_order=None)

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K], exactly as the format defines it."""
        ordered = self.in_order()
        return find_format(self.format).dequantize(ordered.planes, self.shape)

    def dense(self) -> Tensor:
        """The weight in ``dtype``, dequantized a few rows at a time."""
        (n, k), form = self.shape, find_format(self.format)
        device = next(iter(self.planes.values())).device
        step = max(1, _CHUNKS[device.type] // max(1, k))
        if n <= step:
            return self.dequantize().to(self.dtype)
        planes = self.in_order().planes
        out = torch.empty(self.shape, dtype=self.dtype, device=device)
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            out[rows] = form.dequantize(form.rows(planes, rows), (rows.stop - begin, k))
        return out


# One weight of a checkpoint: dense [N, K] in a float dtype, or quantized.
Stored: TypeAlias = Tensor | Planes


def quantize(weight: Tensor, format: str) -> Planes:
    """Round a float weight [N, K] to Q4_0, Q4_1 or Q8_0.

    Raises:
        ValueError: another format, or K not a multiple of its block.
    """
    return Planes(format, gguf.quantize(weight, format), (weight.shape[0], weight.shape[1]))


def dense(weight: Stored) -> Tensor:
    """A stored weight as a tensor [N, K]: itself, or in its ``dtype`` if it is quantized."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def reordered(weight: Stored, order: Tensor) -> Stored:
    """The weight whose row i is row ``order[i]`` of the given one; order: int64 [N]."""
    if isinstance(weight, Tensor):
        return weight[order.to(weight.device)]
    before = weight.row_order
    return replace(weight, row_order=order if before is None else before[order])


def stack(weights: Sequence[Planes]) -> Planes:
    """Weights of one format and one K, one below the other.

    Raises:
        ValueError: none given, or formats or K that differ.
    """
    shape = stacked_shape(weights)
    if len({weight.format for weight in weights}) != 1:
        raise ValueError("weights of several formats cannot share planes")
    name = weights[0].format
    planes = find_format(name).stack([weight.in_order().planes for weight in weights])
    return Planes(name, planes, shape, dtype=weights[0].dtype)


def stacked_shape(weights: Sequence[Stored]) -> tuple[int, int]:
    """(N, K) of weights stacked along their rows (a fused QKV or gate-up projection).

    Raises:
        ValueError: none given, one is not 2-D, or their K differ.
    """
    if not weights:
        raise ValueError("no weights to stack")
    shapes = [tuple(w.shape) for w in weights]
    if any(len(s) != 2 for s in shapes) or len({s[1] for s in shapes}) != 1:
        raise ValueError(f"weights to stack must be [N, K] with one K, not {shapes}")
    return sum(s[0] for s in shapes), shapes[0][1]


def beside(weights: Sequence[Stored]) -> Stored:
    """Weights of one N side by side along K: parts of one that are not next to each other.

    Raises:
        ValueError: none given, or several quantized ones that are not of one of GGUF's formats.
    """
    first, *more = weights
    if not more:
        return first
    dense_parts = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(dense_parts) == len(weights):
        return torch.cat(dense_parts, 1)
    parts = [weight.in_order() for weight in weights if isinstance(weight, Planes)]
    if {(part.format, *part.planes) for part in parts} != {(parts[0].format, "blocks")}:
        raise ValueError("quantized weights but GGUF's cannot be joined along K")
    blocks = torch.cat([part.planes["blocks"] for part in parts], 1)
    width = sum(part.shape[1] for part in parts)
    return replace(parts[0], planes={"blocks": blocks}, shape=(parts[0].shape[0], width))


# ------------------------------------------------------------------------------- parts for shards


Range: TypeAlias = tuple[int, int]  # [begin, end)


@dataclass(frozen=True, slots=True)
class Rows:
    """Ranges along N joined in order: output features, as q, k, v, gate and up are split."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """A range along K: input features, as o and down are split."""

    begin: int
    end: int


Part: TypeAlias = Rows | Columns | None


def share(size: int, index: int, count: int, unit: int = 1) -> Range:
    """Share ``index`` of ``count`` of ``size`` elements, at borders of units.

    Shares are as equal as whole units allow; all of them together are the whole.

    Raises:
        ValueError: there is no such share, or ``size`` is not a whole number of units.
    """
    if not 0 <= index < count:
        raise ValueError(f"there is no share {index} of {count}")
    if size % unit:
        raise ValueError(f"{size} elements are not a whole number of units of {unit}")
    units = size // unit
    return units * index // count * unit, units * (index + 1) // count * unit


def part_of(weight: Stored, part: Part) -> Stored:
    """A shard's part of a weight; for Columns of a quantized one, between blocks.

    Raises:
        ValueError: it reaches beyond the weight, or cuts a block.
    """
    if part is None:
        return weight
    n, k = weight.shape
    if isinstance(part, Rows):
        _check_ranges(part.ranges, n)
        if isinstance(weight, Tensor):
            return rows_of(weight, part).contiguous()
        form, order = find_format(weight.format), weight.row_order
        index: slice | Tensor
        if order is not None:
            index = rows_of(order, part)
        elif len(part.ranges) == 1:
            index = slice(*part.ranges[0])
        else:
            index = rows_of(torch.arange(n), part)
        planes = form.rows(weight.planes, index)
        height = sum(end - begin for begin, end in part.ranges)
        return replace(weight, planes=planes, shape=(height, k), row_order=None)
    begin, end = part.begin, part.end
    _check_ranges([(begin, end)], k)
    if isinstance(weight, Tensor):
        return weight[:, begin:end].contiguous()
    form = find_format(weight.format)
    if begin % form.block or (end % form.block and end != k):
        blocks = k // form.block
        fits = ", ".join(str(count) for count in range(1, blocks + 1) if blocks % count == 0)
        raise ValueError(
            f"columns {begin} to {end} of {k} cut a block of {form.block} elements of "
            f"{weight.format}: into so many parts it can be cut between blocks: {fits}"
        )
    planes = form.columns(weight.planes, begin, end)
    return replace(weight, planes=planes, shape=(n, end - begin))


def rows_of(tensor: Tensor, part: Rows) -> Tensor:
    """The part of a tensor [N, ...]: a view where it is one range."""
    if len(part.ranges) == 1:
        return tensor[slice(*part.ranges[0])]
    return torch.cat([tensor[begin:end] for begin, end in part.ranges])


def _check_ranges(ranges: Sequence[Range], size: int) -> None:
    for begin, end in ranges:
        if not 0 <= begin <= end <= size:
            raise ValueError(f"there is no part {begin} to {end} of {size}")


# --------------------------------------------------------------------------- what is computed with


class Norm(NamedTuple):
    """An rms_norm before a projection: weight [K], eps, and the offset added to the weight."""

    weight: Tensor
    eps: float
    weight_offset: float = 0.0


class Weight(ABC):
    """A weight [N, K] in one backend's layout.

    shape: (N, K). format: what is stored ("BF16", "Q4_1", "Q4_K+Q6_K" for a stack of several).
    nbytes: memory it takes.
    """

    __slots__ = ()

    shape: tuple[int, int]
    format: str
    nbytes: int

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        gate: str = "",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """residual + gate(norm(x) W^T + bias), in as few passes as pay on the device.

        x: [T, K], never written to. bias: [N]. norm: applied to x first; None: none.
        gate: activation of a gated MLP, whose gate and up rows are stacked in this weight: [T, N]
            becomes act(first half) * second half; "": none.
        residual: [T, N] ([T, N / 2] if gated), other memory than x. The sum is returned in its
            dtype and may be written into it.
        out_dtype: of the result; None: x's dtype. Not together with residual.

        Returns:
            [T, N], or [T, N / 2] if gated.

        Raises:
            ValueError: shapes, dtypes or layouts that do not fit.
        """

    def linear_of_sum(
        self,
        x: Tensor,
        residual: Tensor,
        norm: Norm,
        bias: Tensor | None = None,
        *,
        gate: str = "",
    ) -> Tensor | None:
        """``linear`` of norm(residual + x), for less than the norm and ``linear`` would take.

        The sum is written into the residual. None, and nothing written, if there is no such way.
        """
        return None

    def adds_residual(self, rows: int) -> bool:
        """True if ``linear`` of so many rows adds a residual for less than the next norm would."""
        return False

    @abstractmethod
    def rows(self, ids: Tensor, scale: float = 1.0, out_dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``ids`` (int32 [T]) of the weight, times scale: [T, K].

        out_dtype: None: the dtype of a dense weight, float32 of a quantized one.

        Raises:
            ValueError: ids of another type; on a CPU also an id outside the weight's rows.
        """

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The numbers that ``linear`` computes with: float32 [N, K]."""

    @property
    def num_elements(self) -> int:
        """N * K, however many bits each takes."""
        return self.shape[0] * self.shape[1]


class ExpertBiases(NamedTuple):
    """Biases of a mixture's projections: of gate and up stacked [E, 2F], and of down [E, D]."""

    gate_up: Tensor
    down: Tensor


def has_gate(rows: int, width: int) -> bool:
    """True where an expert's first projection, of ``rows``, is its gate and its up.

    width: columns of its second projection.

    Raises:
        ValueError: the first has neither twice as many rows as that nor as many.
    """
    if rows not in (width, 2 * width):
        raise ValueError(f"an expert of {rows} rows does not fit one of {width} columns")
    return rows != width


class Experts(ABC):
    """The weights of a mixture of E MLPs, in one backend's layout.

    They are gated where ``has_gate``; otherwise an expert is down(act(up(x))).
    """

    __slots__ = ()

    num_elements: int

    @abstractmethod
    def mix(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        *,
        kind: str = "silu",
        first: int = 0,
    ) -> Tensor:
        """Each row of x [T, D] through the experts that routing chooses by router_logits [T, E].

        Returns [T, D]. kind: of the activation, gated or not. first: the router's number of the
        first of these experts, where they are a shard's: the others add nothing.

        Raises:
            ValueError: shapes, dtypes or layouts that do not fit.
        """
