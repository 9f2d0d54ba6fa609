"""QuantizedWeights: a checkpoint's float matrices, rounded to 4 or 8 bits as they are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.kernels.formats.grouped import (
    round_to_fp8,
    round_to_int4,
    round_to_int8,
    round_to_mxfp4,
)
from octavo.kernels.weights import Part, Planes, Range, Rows, Stored, quantize, stack

_OUTPUT_HEAD = "lm_head"
# Rows rounded at once: bounds the float32 copies. A multiple of every block's rows.
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Rounding:
    """One way to round matrices.

    round: a weight [N, K] -> its planes. multiple: of K that it takes. by_rows: so many rows at a
    time give what all give. wide: the rounding of embeddings and the output head, on which every
    token's first state and every logit depend; None: they stay floats. experts: a mixture's are
    rounded too, since there are kernels for them.
    """

    round: Callable[[Tensor], Planes]
    multiple: int = 1
    by_rows: bool = True
    wide: str | None = None
    experts: bool = False


def _gguf(kind: str) -> Rounding:
    return Rounding(lambda weight: quantize(weight, kind), multiple=32, wide="Q8_0", experts=True)


def _fp8(block: Callable[[Tensor], tuple[int, int]], *, by_rows: bool = True) -> Rounding:
    def round_all(weight: Tensor) -> Planes:
        return _planes("FP8", round_to_fp8(weight, block(weight)), weight)

    return Rounding(round_all, by_rows=by_rows)


def _grouped(
    format: str, round_groups: Callable[[Tensor, int], dict[str, Tensor]], size: int
) -> Rounding:
    def round_all(weight: Tensor) -> Planes:
        return _planes(format, round_groups(weight, size), weight)

    return Rounding(round_all, multiple=size)


def _planes(format: str, planes: dict[str, Tensor], weight: Tensor) -> Planes:
    return Planes(format, planes, (weight.shape[0], weight.shape[1]), dtype=weight.dtype)


ROUNDINGS = {
    "Q4_1": _gguf("Q4_1"),
    "Q8_0": _gguf("Q8_0"),
    # 128 columns: AWQ's and GPTQ's usual group.
    "INT4": _grouped("INT4", round_to_int4, 128),
    "INT8": _grouped("INT8", round_to_int8, 128),
    "MXFP4": _grouped("FP4", round_to_mxfp4, 32),
    "FP8 by channel": _fp8(lambda weight: (1, weight.shape[1])),
    "FP8 by tensor": _fp8(lambda weight: (weight.shape[0], weight.shape[1]), by_rows=False),
    "FP8 by block": _fp8(lambda weight: (128, 128)),
}


class QuantizedWeights:
    """``inner``'s matrices rounded by ``rounding``, one of ROUNDINGS.

    Matrices that are quantized already, or whose rows it cannot take, stay as they are. Only one
    matrix at a time is held as floats.
    """

    def __init__(self, inner: Weights, rounding: str) -> None:
        self._inner = inner
        self._rounding = ROUNDINGS[rounding]
        wide = self._rounding.wide
        self._wide = None if wide is None else ROUNDINGS[wide]
        self.act_dtype = inner.act_dtype

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        rounding = self._wide if prefix == _OUTPUT_HEAD else self._rounding
        return _rounded(self._inner.linear(prefix, shape, part), rounding)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return _rounded(self._inner.embedding(prefix, shape, part), self._wide)

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
            yield _rounded(weight, self._rounding if self._rounding.experts else None)

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


def _rounded(weight: Stored, rounding: Rounding | None) -> Stored:
    if rounding is None or isinstance(weight, Planes) or weight.shape[1] % rounding.multiple:
        return weight
    if not rounding.by_rows or weight.shape[0] <= _ROWS:
        return rounding.round(weight)
    return stack([rounding.round(rows) for rows in torch.split(weight, _ROWS)])
