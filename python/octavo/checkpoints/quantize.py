"""QuantizedWeights: a checkpoint's float matrices, rounded to 4 or 8 bits as they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.weights import Part, Planes, Rows, Stored, quantize, stack

# Of embeddings and the output head: every token's first state and every logit depends on them.
_WIDE_FORMAT = "Q8_0"
_OUTPUT_HEAD = "lm_head"
# Rows rounded at once: bounds the float32 copies.
_ROWS = 4096
_GROUP = 32


class QuantizedWeights:
    """``inner``'s matrices in ``format`` (Q4_1 or Q8_0), embeddings and output head in Q8_0.

    Matrices that are quantized already, or whose rows are not whole groups of 32, stay as they
    are. Only one matrix at a time is held as floats.
    """

    def __init__(self, inner: Weights, format: str) -> None:
        self._inner = inner
        self._format = format
        self.act_dtype = inner.act_dtype

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        format = _WIDE_FORMAT if prefix == _OUTPUT_HEAD else self._format
        return _rounded(self._inner.linear(prefix, shape, part), format)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return _rounded(self._inner.embedding(prefix, shape, part), _WIDE_FORMAT)

    def experts(
        self, prefix: str, count: int, name: str, shape: tuple[int, int], part: Part = None
    ) -> Iterator[Stored]:
        for weight in self._inner.experts(prefix, count, name, shape, part):
            yield _rounded(weight, self._format)

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        return self._inner.vector(name, size, part)

    def unread(self) -> set[str]:
        return self._inner.unread()

    def finish(self, read: Collection[str] = ()) -> None:
        self._inner.finish(read)


def _rounded(weight: Stored, format: str) -> Stored:
    if isinstance(weight, Planes) or weight.shape[1] % _GROUP:
        return weight
    return stack([quantize(rows, format) for rows in torch.split(weight, _ROWS)])
