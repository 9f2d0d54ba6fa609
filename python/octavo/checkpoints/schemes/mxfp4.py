"""Mxfp4Scheme: gpt-oss's experts in 4-bit floats; everything else is dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from octavo.checkpoints.schemes.cut import Cover, Cut, window
from octavo.checkpoints.schemes.fp4 import fp4_planes
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Range, Stored

_BYTES = {"U8": torch.uint8}
# Columns of an exponent.
_GROUP = 32


class Mxfp4Scheme(Scheme):
    """``experts.NAME_blocks`` uint8 [E, N, K / 32, 16], two elements a byte, the low half first.

    ``experts.NAME_scales`` uint8 [E, N, K / 32] are exponents of two, counted from 2^-127.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        pass

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        return read_dense(tensors, prefix, shape, part)

    def experts(
        self,
        tensors: Tensors,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part,
        own: Range,
    ) -> Iterator[Stored]:
        module = f"{prefix}.{name}"
        if f"{module}_blocks" not in tensors:
            yield from super().experts(tensors, prefix, count, name, shape, part, own)
            return
        n, k = shape
        if k % _GROUP:
            raise ModelLoadError(f"{module}: {k} columns are no whole blocks of {_GROUP}")
        cut, size = Cut.of(part, shape), (count, n, k // _GROUP)
        # Whole groups' bytes follow one another.
        along = Cover((cut.columns,), _GROUP, _GROUP // 2)
        groups = window([own], cut.rows, [cut.groups(_GROUP)])
        blocks = tensors.read(f"{module}_blocks", (*size, _GROUP // 2), kinds=_BYTES, part=groups)
        exponents = tensors.read(f"{module}_scales", size, kinds=_BYTES, part=groups)
        for pairs, exponent in zip(blocks, exponents, strict=True):
            scale = exponent.view(torch.float8_e8m0fnu).float()
            planes = fp4_planes(pairs.flatten(1), scale, cut.columns, along, _GROUP)
            yield grouped(tensors, module, "FP4", planes, cut.shape)
