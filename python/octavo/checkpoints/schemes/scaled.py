"""Bytes times scales: the layout shared by FP8 and int8 weights of several schemes."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cover, Cut, window
from octavo.checkpoints.schemes.scheme import Tensors, grouped
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.grouped import group_map
from octavo.kernels.weights import Part, Range, Stored

FP8_KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
INT8_KINDS = {"I8": torch.int8}
_BYTE_KINDS = {**FP8_KINDS, **INT8_KINDS}
# Shapes of a scale for all.
_PER_TENSOR: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
# Powers of two are stored as their exponents by some, or as these in bytes.
_SCALE_KINDS = {**DENSE_DTYPES, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}


def read_scaled(
    tensors: Tensors,
    prefix: str,
    shape: tuple[int, int],
    part: Part,
    *,
    scale: str,
    block: tuple[int, int] | None,
    zero: str | None = None,
) -> Stored:
    """``prefix.weight`` [N, K] of bytes, less the integers ``zero``, times the tensor ``scale``.

    ``block``: (rows, columns) of one scale; None: one for a row, or one for all.

    Raises:
        ModelLoadError: a tensor is missing, misshapen, or of another type.
    """
    cut, size = Cut.of(part, shape), scale_columns(tensors, scale, shape, block)
    groups = cut.groups(size)
    q = tensors.read(f"{prefix}.weight", shape, part=cut.window, kinds=_BYTE_KINDS)
    planes = {
        "q": q,
        "scale": read_scales(tensors, scale, shape, block, cut.rows, groups),
        **group_map(cut.columns, size, q.device),
    }
    if zero is not None:
        planes["zero"] = read_scales(tensors, zero, shape, block, cut.rows, groups, INT8_KINDS)
    format = "INT8" if q.dtype == torch.int8 else "FP8"
    return grouped(tensors, prefix, format, planes, cut.shape)


def scale_columns(
    tensors: Tensors, name: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> int:
    """Columns of a weight [N, K] that one scale of the tensor ``name`` is for.

    Raises:
        ModelLoadError: the tensor is missing, or has another shape than ``block`` asks for.
    """
    (n, k), found = shape, tensors.shape(name)
    if block is not None and found in _block_shapes(shape, block):
        return block[1]
    if found in (*_PER_TENSOR, (n,), (n, 1)):
        return k
    wanted = "one scale, or one a row"
    if block is not None:
        wanted = f"blocks of {block[0]} x {block[1]}"
    raise ModelLoadError(f"tensor {name} has shape {list(found)}, not {wanted} of {n} x {k}")


def read_scales(
    tensors: Tensors,
    name: str,
    shape: tuple[int, int],
    block: tuple[int, int] | None,
    rows: tuple[Range, ...],
    groups: Range,
    kinds: dict[str, torch.dtype] = _SCALE_KINDS,
) -> Tensor:
    """Scales of these rows of a weight [N, K], and of these groups of its columns: one row each.

    Raises:
        ModelLoadError: the tensor is missing, or has another shape than ``block`` asks for.
    """
    found, height = tensors.shape(name), sum(end - begin for begin, end in rows)
    scale_columns(tensors, name, shape, block)  # checks the shape
    if block is None or found not in _block_shapes(shape, block):
        if found in _PER_TENSOR:
            return tensors.read(name, found, kinds=kinds).view(1, 1).repeat(height, 1)
        return tensors.read(name, found, part=window(rows), kinds=kinds).view(height, 1)
    cover = Cover(rows, block[0])
    within: list[list[Range]] = [[(0, 1)]] if len(found) > 2 else []
    part = window(cover.stored, *within, [groups])
    scales = tensors.read(name, found, part=part, kinds=kinds).flatten(1)
    scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
    scales = scales.float() if scales.dtype == torch.float8_e8m0fnu else scales
    if block[0] > 1:
        pieces = cover.pieces(scales, 0)
        scales = torch.cat([piece.repeat_interleave(block[0], 0)[own] for piece, own in pieces])
    return scales.contiguous()


def _block_shapes(shape: tuple[int, int], block: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """Of scales by block: ModelOpt's have a dimension for what is in a block, too."""
    high, wide = (-(-size // own) for size, own in zip(shape, block, strict=True))
    return (high, wide), (high, 1, wide, 1)
