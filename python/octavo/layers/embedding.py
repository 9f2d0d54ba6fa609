"""Token embedding and the output head, which may be the same weight."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Stored, Weight


class Embedding:
    """Rows of ``weight`` [V, D] by token id, times ``scale``, in ``dtype``."""

    __slots__ = ("_rows", "dtype", "scale", "weight")

    def __init__(self, ops: OpSet, weight: Stored, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.weight: Weight = ops.weight([weight])
        self._rows = self.weight.rows
        self.dtype = dtype
        self.scale = scale

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, D]."""
        return self._rows(ids, self.scale, self.dtype)


class LMHead:
    """Hidden states to logits: softcap(scale * (x W^T + b)).

    ``weight``: [V, D]; a tied head is given the embedding's own, not a copy. ``softcap`` 0: none.
    ``bias``: [V] or None.
    """

    __slots__ = ("_linear", "bias", "scale", "softcap", "weight")

    def __init__(
        self,
        weight: Weight,
        softcap: float = 0.0,
        *,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        self._linear = weight.linear
        self.weight = weight
        self.softcap = softcap
        self.scale = scale
        self.bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        logits = self._linear(hidden, self.bias, out_dtype=torch.float32)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
