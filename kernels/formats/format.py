"""Format: the layout of one quantized weight's planes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

# A weight's tensors by their meaning: "blocks", or "q", "scale", "zero" and so on.
PlaneMap: TypeAlias = Mapping[str, Tensor]


class Format(ABC):
    """A weight [N, K] as planes, each of which has N rows.

    A format with planes of another height (one scale for 128 rows) overrides ``rows`` and
    ``stack``. ``block``: elements of a row that are stored together; K may be split between blocks.
    """

    name: str
    block: int

    @abstractmethod
    def check(self, planes: PlaneMap, shape: tuple[int, int]) -> None:
        """Refuse planes that cannot be a weight of this shape.

        Raises:
            ValueError: a plane that is missing, or of another size, type or layout.
        """

    @abstractmethod
    def dequantize(self, planes: PlaneMap, shape: tuple[int, int]) -> Tensor:
        """Decode, as the reference: float32 [N, K], exactly as the format defines it."""

    @abstractmethod
    def columns(self, planes: PlaneMap, begin: int, end: int) -> dict[str, Tensor]:
        """The planes of columns [begin, end), both multiples of ``block``."""

    def rows(self, planes: PlaneMap, index: slice | Tensor) -> dict[str, Tensor]:
        """The planes of some rows: views of a slice, copies for an int64 index."""
        return {name: plane[index] for name, plane in planes.items()}

    def stack(self, parts: Sequence[PlaneMap]) -> dict[str, Tensor]:
        """The planes of several weights of one K, one below the other."""
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
