"""Bytes times scales: the layout shared by FP8 and int8 weights of several schemes."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.schemes.scheme import Tensors, grouped
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.grouped import group_map
from octavo.kernels.weights import Part, Stored

FP8_KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
INT8_KINDS = {"I8": torch.int8}
_BYTE_KINDS = {**FP8_KINDS, **INT8_KINDS}
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
    q = tensors.read(f"{prefix}.weight", shape, kinds=_BYTE_KINDS)
    scales, size = read_scales(tensors, scale, shape, block)
    planes = {"q": q, "scale": scales, **group_map(shape[1], size, q.device)}
    if zero is not None:
        planes["zero"] = read_scales(tensors, zero, shape, block, INT8_KINDS)[0]
    return grouped(tensors, prefix, "INT8" if q.dtype == torch.int8 else "FP8", planes, shape, part)


def read_scales(
    tensors: Tensors,
    name: str,
    shape: tuple[int, int],
    block: tuple[int, int] | None,
    kinds: dict[str, torch.dtype] = _SCALE_KINDS,
) -> tuple[Tensor, int]:
    """Scales of a weight [N, K], one row each: ([N, G], columns of a group).

    Raises:
        ModelLoadError: the tensor is missing, or has another shape than ``block`` asks for.
    """
    n, k = shape
    found = tensors.shape(name)
    per_row = ((n,), (n, 1))
    rows, size = (n, k) if block is None else block
    blocks = (-(-n // rows), -(-k // size))
    # ModelOpt's have a dimension for what is in a block, too.
    if block is not None and found in (blocks, (blocks[0], 1, blocks[1], 1)):
        scales = tensors.read(name, found, kinds=kinds).view(blocks)
        scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
        scales = scales.float() if scales.dtype == torch.float8_e8m0fnu else scales
        scales = scales.repeat_interleave(rows, 0)[:n] if rows > 1 else scales
    elif found in per_row:
        scales, size = tensors.read(name, found, kinds=kinds).view(n, 1), k
    elif found in ((), (1,), (1, 1)):
        scales, size = tensors.read(name, found, kinds=kinds).view(1, 1).repeat(n, 1), k
    else:
        wanted = "one scale, or one a row" if block is None else f"blocks of {rows} x {size}"
        raise ModelLoadError(f"tensor {name} has shape {list(found)}, not {wanted} of {n} x {k}")
    return scales.contiguous(), size
