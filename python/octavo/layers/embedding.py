"""Token embedding and the output head, which may be the same weight."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Range, Stored, Weight


class Embedding:
    """Rows of ``weight`` [V, D] by token id, times ``scale``, in ``dtype``.

    ``rows``: where the ranks share the table, the ids that ``weight`` has the rows of.
    """

    __slots__ = ("_rank", "_rows", "_share", "dtype", "scale", "weight")

    def __init__(
        self,
        ops: OpSet,
        weight: Stored,
        dtype: torch.dtype,
        scale: float = 1.0,
        rows: Range | None = None,
    ) -> None:
        self.weight: Weight = ops.weight([weight])
        self._rows = self.weight.rows
        self._rank = ops.rank
        self._share = rows if ops.rank.size > 1 else None
        self.dtype = dtype
        self.scale = scale

    def __call__(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, D]."""
        if self._share is None:
            return self._rows(ids, self.scale, self.dtype)
        begin, end = self._share
        is_here = (ids >= begin) & (ids < end)
        found = self._rows((ids - begin).clamp(0, end - begin - 1), self.scale, self.dtype)
        # One rank has the row, and the others add zeros to it.
        return self._rank.reduce(found.masked_fill(~is_here[:, None], 0.0))


class LMHead:
    """Hidden states to logits: softcap(scale * (x W^T + b)).

    ``weight``: [V, D], or a rank's share of it; a tied head is given the embedding's own.
    ``num_ids``: V. ``softcap`` 0: none. ``bias``: [V], or the rank's, or None.
    """

    __slots__ = ("_linear", "_num_ids", "_rank", "bias", "scale", "softcap", "weight")

    def __init__(
        self,
        ops: OpSet,
        weight: Weight,
        num_ids: int,
        softcap: float = 0.0,
        *,
        scale: float = 1.0,
        bias: Tensor | None = None,
    ) -> None:
        self._linear = weight.linear
        self._rank = ops.rank
        self._num_ids = num_ids
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
        return self._rank.gather(logits, self._num_ids)
