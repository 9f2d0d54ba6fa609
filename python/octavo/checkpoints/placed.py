"""PlacedWeights: a checkpoint's quantized matrices on the device that computes with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.weights import Part, Range, Rows, Stored


class PlacedWeights:
    """``inner``'s weights, with planes on ``device``, and ``dtype`` for what stands in for them.

    For planes that are views of a mapped file: only one matrix at a time is copied.
    """

    def __init__(self, inner: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self._inner, self._device, self._dtype = inner, device, dtype
        self.act_dtype = inner.act_dtype

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._placed(self._inner.linear(prefix, shape, part))

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._placed(self._inner.embedding(prefix, shape, part))

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        for weight in self._inner.experts(prefix, count, name, shape, part, own):
            yield self._placed(weight)

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        return self._inner.vector(name, size, part)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._inner.tensor(name, shape)

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        return self._inner.kv_scales(prefix, num_kv_heads)

    def unread(self) -> set[str]:
        return self._inner.unread()

    def finish(self, read: Collection[str] = ()) -> None:
        self._inner.finish(read)

    def _placed(self, weight: Stored) -> Stored:
        if isinstance(weight, Tensor):
            return weight
        planes = {name: plane.to(self._device) for name, plane in weight.planes.items()}
        order = weight.row_order
        order = None if order is None else order.to(self._device)
        return replace(weight, planes=planes, row_order=order, dtype=self._dtype)
