"""AwqScheme: AWQ files of AutoAWQ and llm-awq's successors, 4 bits with zero points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cover, Cut, window, words_of
from octavo.checkpoints.schemes.packing import WORDS, unpack
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.formats.grouped import group_map
from octavo.kernels.weights import Part, Range, Stored

_BITS = 4
_PER_WORD = 8
# Nibble of a word, from the lowest, that holds its column 0, 1, ...
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqScheme(Scheme):
    """qweight, qzeros and scales by ``version``; ``group_size`` -1 is the whole of K.

    gemm: int32 [K, N / 8] and [G, N / 8], packed along N with columns interleaved; scales [G, N].
    gemv: int32 [N, K / 8] and [N, W], packed along K in order; scales [N, 8 W], of which G count.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits = config.get("bits", config.get("w_bit", _BITS))
        if bits != _BITS:
            raise ModelLoadError(f"awq: {bits} bits are not read, only {_BITS}")
        self._group_size = int(config.get("group_size", config.get("q_group_size", 128)))
        # GPTQModel's AWQ files have GPTQ's keys.
        named = (config.get(key) for key in ("version", "checkpoint_format", "format"))
        version = str(next(filter(None, named), "gemm")).lower()
        if version not in ("gemm", "gemv"):
            raise ModelLoadError(f"awq: version {version!r} is not read; convert it to gemm")
        self._read = _read_gemm if version == "gemm" else _read_gemv

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        if f"{prefix}.qweight" not in tensors:
            return read_dense(tensors, prefix, shape, part)
        n, k = shape
        size = k if self._group_size == -1 else self._group_size
        if size < 1 or k % size or (n if self._read is _read_gemm else k) % _PER_WORD:
            raise ModelLoadError(
                f"{prefix}: awq cannot hold {n} x {k} in groups of {size} and words of {_PER_WORD}"
            )
        cut = Cut.of(part, shape)
        groups = cut.groups(size)
        planes = self._read(tensors, prefix, shape, cut, groups, k // size)
        planes |= group_map(cut.columns, size, tensors.device)
        return grouped(tensors, prefix, "INT4", planes, cut.shape)


def _read_gemm(
    tensors: Tensors, prefix: str, shape: tuple[int, int], cut: Cut, groups: Range, height: int
) -> dict[str, Tensor]:
    """Planes of a cut and of its groups, of ``height`` in all."""
    (n, k), along = shape, words_of(cut.rows, _BITS)
    words, zeros = (
        tensors.read(
            f"{prefix}.{name}",
            (size, n // _PER_WORD),
            part=window([own], along.stored),
            kinds=WORDS,
        )
        for name, size, own in (("qweight", k, cut.columns), ("qzeros", height, groups))
    )
    scales = tensors.read(f"{prefix}.scales", (height, n), part=window([groups], cut.rows))
    return {
        "q": _columns(words, along),
        "zero": _columns(zeros, along),
        "scale": scales.t().contiguous(),
    }


def _columns(packed: Tensor, along: Cover) -> Tensor:
    """int32 [R, W], the words stored ``along`` the second dimension -> uint8 [V, R]."""
    found = []
    for piece, own in along.pieces(packed, 1):
        words = piece.t().contiguous()
        values = torch.empty(
            (words.shape[0], _PER_WORD, words.shape[1]), dtype=torch.uint8, device=words.device
        )
        for column, nibble in enumerate(_NIBBLES):
            values[:, column] = words >> _BITS * nibble & (1 << _BITS) - 1
        found.append(values.flatten(0, 1)[own])
    return found[0] if len(found) == 1 else torch.cat(found)


def _read_gemv(
    tensors: Tensors, prefix: str, shape: tuple[int, int], cut: Cut, groups: Range, width: int
) -> dict[str, Tensor]:
    """Planes of a cut and of its groups, of ``width`` in all."""
    n, k = shape
    # The padding depends on the writer, so that the files give the width.
    width = max(tensors.shape(f"{prefix}.qzeros")[-1], -(-width // _PER_WORD))
    columns, along = words_of([cut.columns], _BITS), words_of([groups], _BITS)
    words, zeros = (
        tensors.read(f"{prefix}.{name}", (n, size), part=window(cut.rows, own.stored), kinds=WORDS)
        for name, size, own in (("qweight", k // _PER_WORD, columns), ("qzeros", width, along))
    )
    scales = tensors.read(
        f"{prefix}.scales", (n, width * _PER_WORD), part=window(cut.rows, [groups])
    )
    return {
        "q": unpack(words, columns, _BITS),
        "zero": unpack(zeros, along, _BITS),
        "scale": scales.contiguous(),
    }
