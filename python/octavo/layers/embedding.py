"""Token embedding and the output head, which may be the same weight."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.packed import QuantTensor
from octavo.layers.ops import Ops, Weight


class Embedding:
    """Rows of ``weight`` [V, D] by token id, times ``scale``, in ``dtype``."""

    __slots__ = ("_embedding", "dtype", "scale", "weight")

    def __init__(
        self,
        ops: Ops,
        weight: Tensor | QuantTensor,
        dtype: torch.dtype,
        scale: float = 1.0,
        *,
        exact: bool = False,
    ) -> None:
        self._embedding = ops.embedding
        self.weight: Weight = ops.prepare_linear(weight, exact=exact)
        self.dtype = dtype
        self.scale = scale

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, D]."""
        return self._embedding(ids, self.weight, scale=self.scale, out_dtype=self.dtype)


class LMHead:
    """Hidden states to logits. ``weight``: [V, D], ready for ``ops.linear``."""

    __slots__ = ("_linear", "softcap", "weight")

    def __init__(self, ops: Ops, weight: Weight, softcap: float = 0.0) -> None:
        self._linear = ops.linear
        self.weight = weight
        self.softcap = softcap

    @classmethod
    def tied(cls, ops: Ops, embedding: Embedding, softcap: float = 0.0) -> LMHead:
        """The embedding's own weight, not a copy."""
        return cls(ops, embedding.weight, softcap)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        logits = self._linear(hidden, self.weight, out_dtype=torch.float32)
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
