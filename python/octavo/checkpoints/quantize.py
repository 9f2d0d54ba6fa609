"""QuantizedWeights: a checkpoint's float matrices, rounded to 4 or 8 bits as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.packed import QuantTensor, quantize

# Every logit comes from these, and every token's first state: they keep 8 bits.
_WIDE = ("embed_tokens.weight", "lm_head.weight")
# Rows rounded at once: bounds the float32 copies.
_ROWS = 4096
_GROUP = 32


class QuantizedWeights:
    """``inner``'s matrices as ``kind`` (Q4_1 or Q8_0), embeddings and output head as Q8_0.

    Matrices that are quantized already, or whose rows are not whole groups of 32, stay as they
    are. Only one matrix at a time is held as floats.
    """

    def __init__(self, inner: Weights, kind: str, *, exact: bool) -> None:
        self._inner = inner
        self._kind = kind
        self.act_dtype = inner.act_dtype
        self.exact = exact

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        weight = self._inner.matrix(name, shape)
        if isinstance(weight, QuantTensor) or shape[1] % _GROUP:
            return weight
        kind = "Q8_0" if name.endswith(_WIDE) else self._kind
        chunks = [quantize(rows, kind).data for rows in torch.split(weight, _ROWS)]
        return QuantTensor(torch.cat(chunks), kind, shape)

    def vector(self, name: str, size: int) -> Tensor:
        return self._inner.vector(name, size)

    def finish(self) -> None:
        self._inner.finish()
