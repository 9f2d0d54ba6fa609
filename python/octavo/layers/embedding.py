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
    """Hidden states to logits: softcap(scale * (x W^T + b)).

    ``weight``: [V, D], ready for ``ops.linear``; a tied head is given the embedding's own, not a
    copy. ``softcap`` 0: none. ``bias``: [V] or None.
    """

    __slots__ = ("_linear", "bias", "scale", "softcap", "weight")

    def __init__(
        self,
        ops: Ops,
        weight: Weight,
        softcap: float = 0.0,
        *,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        self._linear = ops.linear
        self.weight = weight
        self.softcap = softcap
        self.scale = scale
        self.bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        logits = self._linear(hidden, self.weight, self.bias, out_dtype=torch.float32)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
