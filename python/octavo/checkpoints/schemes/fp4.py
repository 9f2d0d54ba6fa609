"""4-bit floats (e2m1) with a scale for each run of a row: NVFP4 and MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cover, Cut, window
from octavo.checkpoints.schemes.scheme import Tensors, grouped
from octavo.errors import ModelLoadError
from octavo.kernels.formats.grouped import e2m1_codes, group_map
from octavo.kernels.weights import Part, Range, Stored

_BYTES = {"U8": torch.uint8}
_SCALES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, **_BYTES}
# Columns of a scale, by its type: NVFP4's are floats, MXFP4's exponents of two, kept as bytes.
_NVFP4_GROUP, _MXFP4_GROUP = 16, 32


def read_fp4(
    tensors: Tensors,
    prefix: str,
    shape: tuple[int, int],
    part: Part,
    *,
    packed: str,
    factor: Tensor | None,
) -> Stored:
    """``packed`` uint8 [N, K / 2], the low half first, times the module's scales and ``factor``.

    Raises:
        ModelLoadError: a tensor is missing or misshapen, or K is odd.
    """
    (n, k), name = shape, f"{prefix}.weight_scale"
    if k % 2:
        raise ModelLoadError(f"{prefix}: 4-bit floats are stored in pairs, not {k} in a row")
    cut = Cut.of(part, shape)
    along = Cover((cut.columns,), 2)
    pairs = tensors.read(packed, (n, k // 2), part=window(cut.rows, along.stored), kinds=_BYTES)
    size = _NVFP4_GROUP if tensors.kind(name) == "F8_E4M3" else _MXFP4_GROUP
    groups = window(cut.rows, [cut.groups(size)])
    scale = tensors.read(name, (n, -(-k // size)), part=groups, kinds=_SCALES)
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    scale = scale.float() if factor is None else scale.float() * factor
    planes = fp4_planes(pairs, scale, cut.columns, along, size)
    return grouped(tensors, prefix, "FP4", planes, cut.shape)


def fp4_planes(
    pairs: Tensor, scale: Tensor, columns: Range, along: Cover, size: int
) -> dict[str, Tensor]:
    """Planes of ``columns`` in groups of ``size``, whose ``scale`` is given.

    ``pairs``: uint8 [N, P], the low half first, of what is stored ``along`` them.
    """
    [(found, own)] = along.pieces(pairs, 1)
    both = torch.stack([found & 15, found >> 4], 2).flatten(1)
    return {
        "q": both[:, own].contiguous(),
        "scale": scale,
        "codes": e2m1_codes(pairs.device),
        **group_map(columns, size, pairs.device),
    }


def read_factor(tensors: Tensors, name: str) -> Tensor:
    """The one number that a whole weight's scales share: float32, no dimensions.

    Raises:
        ModelLoadError: it is missing, or there are several.
    """
    shape = tensors.shape(name)
    if shape not in ((), (1,)):
        raise ModelLoadError(f"tensor {name} has shape {list(shape)}, not one number")
    return tensors.read(name, shape).float().view(())
