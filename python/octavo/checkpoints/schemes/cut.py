"""Cut: a part of a weight, by its rows and columns, and the places of these in files' tensors.

A file packs values in words, in pairs or in groups under one scale, along either dimension. Of each
tensor a shard reads the least whole units that its part lies in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.weights import Columns, Part, Range, Rows


@dataclass(frozen=True, slots=True)
class Window:
    """Ranges of each of a tensor's first dimensions, joined in order; further ones are whole.

    One dimension at most has several.
    """

    dims: tuple[tuple[Range, ...], ...]

    def covers(self, shape: Sequence[int]) -> bool:
        """True where it is the whole of a tensor of this shape."""
        sizes = shape[: len(self.dims)]
        return all(own == ((0, size),) for own, size in zip(self.dims, sizes, strict=True))


def window(*dims: Sequence[Range]) -> Window:
    """The window of these ranges, dimension by dimension."""
    return Window(tuple(tuple(ranges) for ranges in dims))


def taken(tensor: Tensor, part: Rows | Columns | Window) -> Tensor:
    """A part of a tensor: a view where no ranges are joined."""
    if isinstance(part, Columns):
        return tensor[:, part.begin : part.end]
    if isinstance(part, Rows):
        part = Window((part.ranges,))
    several = [axis for axis, ranges in enumerate(part.dims) if len(ranges) > 1]
    assert len(several) <= 1, part
    axis = several[0] if several else 0
    pieces = []
    for joined in part.dims[axis]:
        ranges = [joined if a == axis else own[0] for a, own in enumerate(part.dims)]
        pieces.append(tensor[tuple(slice(*own) for own in ranges)])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


@dataclass(frozen=True, slots=True)
class Cover:
    """The stored elements that ``ranges`` of a dimension's values lie in.

    ``values`` of them are a unit of ``elements``: no less of it can be read.
    """

    ranges: tuple[Range, ...]
    values: int
    elements: int = 1

    @property
    def stored(self) -> tuple[Range, ...]:
        """Ranges of elements, one for each range of values."""
        return tuple(
            (begin // self.values * self.elements, -(-end * self.elements // self.values))
            for begin, end in self.ranges
        )

    def pieces(self, tensor: Tensor, dim: int) -> Iterator[tuple[Tensor, slice]]:
        """Of a tensor of the stored ranges: each range's elements, and its values in these."""
        at = 0
        for (begin, end), (first, last) in zip(self.ranges, self.stored, strict=True):
            unused = begin % self.values
            yield tensor.narrow(dim, at, last - first), slice(unused, unused + end - begin)
            at += last - first


def words_of(ranges: Sequence[Range], bits: int) -> Cover:
    """Of values of ``bits``, packed in words of 32 from the first on."""
    shared = math.gcd(32, bits)
    return Cover(tuple(ranges), 32 // shared, bits // shared)


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges of a weight's rows, joined in order, and one range of its columns."""

    rows: tuple[Range, ...]
    columns: Range

    @classmethod
    def of(cls, part: Part, shape: tuple[int, int]) -> Cut:
        """The rows and columns of ``part`` of a weight [N, K].

        Raises:
            ValueError: it reaches beyond the weight.
        """
        n, k = shape
        rows = part.ranges if isinstance(part, Rows) else ((0, n),)
        columns = (part.begin, part.end) if isinstance(part, Columns) else (0, k)
        for (begin, end), size in (*((own, n) for own in rows), (columns, k)):
            if not 0 <= begin <= end <= size:
                raise ValueError(f"there is no part {begin} to {end} of {size}")
        return cls(rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the part."""
        begin, end = self.columns
        return sum(last - first for first, last in self.rows), end - begin

    @property
    def window(self) -> Window:
        """Of a tensor [N, K]."""
        return Window((self.rows, (self.columns,)))

    def groups(self, size: int) -> Range:
        """The groups of ``size`` columns that its columns lie in."""
        begin, end = self.columns
        return begin // size, -(-end // size)
