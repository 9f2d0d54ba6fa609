"""Linear: y = x W^T + b, for one weight or several stacked along their rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.packed import QuantTensor
from octavo.layers.ops import Ops, Weight


class Linear:
    """``weight``: [N, K], a tensor or packed by ``ops.prepare_linear``; ``bias``: [N] or None."""

    __slots__ = ("_linear", "bias", "weight")

    def __init__(self, ops: Ops, weight: Tensor | QuantTensor, bias: Tensor | None = None) -> None:
        self._linear = ops.linear
        self.weight: Weight = ops.prepare_linear(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        return self._linear(x, self.weight, self.bias)


class SplitLinear:
    """Linears of one input side by side, where their weights are stored in different kinds.

    Mixed GGUF files (Q4_K_M and the like) keep some values' rows in more bits than the others'.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N1 + N2 + ...]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def stacked_linear(
    ops: Ops, weights: Sequence[Tensor | QuantTensor], bias: Tensor | None = None
) -> Linear | SplitLinear:
    """One projection out of several of the same input: fused where they are stored alike.

    ``weights``: [N1, K], [N2, K], ...; ``bias``: [N1 + N2 + ...] or None.
    """
    if len(weights) == 1:
        return Linear(ops, weights[0], bias)
    kinds = {w.kind if isinstance(w, QuantTensor) else "" for w in weights}
    if len(kinds) > 1:
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if bias is not None:
            biases = bias.split([w.shape[0] for w in weights])
        return SplitLinear([Linear(ops, w, b) for w, b in zip(weights, biases, strict=True)])
    quantized = [w for w in weights if isinstance(w, QuantTensor)]
    if quantized:
        return Linear(ops, stack_rows(quantized), bias)
    return Linear(ops, torch.cat([w for w in weights if isinstance(w, Tensor)]), bias)


def stack_rows(weights: Sequence[QuantTensor]) -> QuantTensor:
    """QuantTensors of one kind and K, one below the other; row permutations stay permutations."""
    num_rows = sum(w.shape[0] for w in weights)
    permutation = None
    if any(w.row_permutation is not None for w in weights):
        pieces, start = [], 0
        for w in weights:
            rows = w.row_permutation
            pieces.append(start + (torch.arange(w.shape[0]) if rows is None else rows))
            start += w.shape[0]
        permutation = torch.cat(pieces)
    return QuantTensor(
        data=torch.cat([w.data for w in weights]),
        kind=weights[0].kind,
        shape=(num_rows, weights[0].shape[1]),
        row_permutation=permutation,
    )
