"""BitsAndBytesScheme: bitsandbytes' nf4, fp4 and int8 files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cover, Cut, Window, taken, window
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.grouped import group_map
from octavo.kernels.weights import Part, Stored, part_of

_BYTES = {"U8": torch.uint8}
_STORAGE = {**DENSE_DTYPES, **_BYTES, "I8": torch.int8}
_ABSMAX = {**DENSE_DTYPES, **_BYTES}
# bitsandbytes' name of a 4-bit type -> the format's.
_FORMATS = {"nf4": "NF4", "fp4": "FP4"}
# int8 rows are scaled to their largest magnitude.
_INT8_MAX = 127


class BitsAndBytesScheme(Scheme):
    """weight, beside its quant_state (4 bits) or SCB (int8), in whatever module has one.

    4 bits: uint8 [N K / 2, 1], or the same bytes as another type's elements
    (``bnb_4bit_quant_storage``), the first of two elements in the high half, in blocks that run
    over the flattened matrix; absmax, one a block, may be quantized itself. int8: [N, K] times SCB
    [N] over 127. LLM.int8's outlier columns are a matter of activations, which stay floats here.
    """

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        for kind in _FORMATS:
            if f"{prefix}.weight.quant_state.bitsandbytes__{kind}" in tensors:
                return _read_4bit(tensors, prefix, shape, part, kind)
        if f"{prefix}.SCB" in tensors:
            return _read_int8(tensors, prefix, shape, part)
        return read_dense(tensors, prefix, shape, part)

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return name.endswith(".weight_format")


def _read_int8(tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
    name = f"{prefix}.weight_format"
    if name in tensors and tensors.read(name, tensors.shape(name), kinds=_BYTES).any():
        raise ModelLoadError(f"tensor {name}: only rows in order (0) are read")
    cut = Cut.of(part, shape)
    q = tensors.read(f"{prefix}.weight", shape, part=cut.window, kinds={"I8": torch.int8})
    absmax = tensors.read(f"{prefix}.SCB", (shape[0],), part=window(cut.rows))
    planes = {"q": q, "scale": absmax.float()[:, None] / _INT8_MAX}
    return grouped(tensors, prefix, "INT8", planes, cut.shape)


def _read_4bit(
    tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part, kind: str
) -> Stored:
    (n, k), name = shape, f"{prefix}.weight"
    state = _read_state(tensors, f"{name}.quant_state.bitsandbytes__{kind}")
    if tuple(state.get("shape", ())) != shape:
        raise ModelLoadError(
            f"tensor {name} holds shape {state.get('shape')}, the config says {list(shape)}"
        )
    kind_of_elements, block = tensors.kind(name), int(state["blocksize"])
    if kind_of_elements not in _STORAGE:
        raise ModelLoadError(f"tensor {name} has type {kind_of_elements}, not supported")
    num_bytes = math.prod(tensors.shape(name)) * _STORAGE[kind_of_elements].itemsize
    if num_bytes != -(-n * k // 2):
        raise ModelLoadError(f"tensor {name} holds {num_bytes} bytes for {n} x {k} of 4 bits")
    per_element = 2 * _STORAGE[kind_of_elements].itemsize
    codes = {"codes": tensors.read(f"{name}.quant_map", (16,)).float()}
    if k % block or k % per_element:
        planes = codes | _flat_planes(tensors, name, shape, state)
        return part_of(grouped(tensors, prefix, _FORMATS[kind], planes, shape), part)
    cut = Cut.of(part, shape)
    planes = codes | _row_planes(tensors, name, shape, cut, per_element, state)
    return grouped(tensors, prefix, _FORMATS[kind], planes, cut.shape)


def _flat_planes(
    tensors: Tensors, name: str, shape: tuple[int, int], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Of a weight whose blocks or elements end inside of a row and go on in the next."""
    (n, k), block = shape, int(state["blocksize"])
    packed = tensors.read(name, tensors.shape(name), kinds=_STORAGE).flatten().view(torch.uint8)
    absmax = _read_absmax(tensors, name, (1, -(-n * k // block)), None, state).flatten()
    return {
        "q": _halves(packed)[: n * k].view(n, k),
        # A scale for each element.
        "scale": absmax.repeat_interleave(block)[: n * k].view(n, k),
    }


def _row_planes(
    tensors: Tensors,
    name: str,
    shape: tuple[int, int],
    cut: Cut,
    per_element: int,
    state: Mapping[str, Any],
) -> dict[str, Tensor]:
    """A cut's, where a row has whole blocks and whole elements, of ``per_element`` values."""
    (n, k), block = shape, int(state["blocksize"])
    along = Cover((cut.columns,), per_element)
    rows = tensors.read(
        name,
        tensors.shape(name),
        stored=(n, k // per_element),
        part=window(cut.rows, along.stored),
        kinds=_STORAGE,
    )
    [(found, own)] = along.pieces(rows, 1)
    groups = window(cut.rows, [cut.groups(block)])
    return {
        "q": _halves(found.contiguous().view(torch.uint8))[:, own].contiguous(),
        "scale": _read_absmax(tensors, name, (n, k // block), groups, state),
        **group_map(cut.columns, block, found.device),
    }


def _halves(pairs: Tensor) -> Tensor:
    """uint8 [..., P] -> [..., 2 P]: the high half of each byte is first."""
    return torch.stack([pairs >> 4, pairs & 15], -1).flatten(-2)


def _read_absmax(
    tensors: Tensors,
    name: str,
    stored: tuple[int, int],
    part: Window | None,
    state: Mapping[str, Any],
) -> Tensor:
    """float32: a part of the blocks' scales, which are one after the other ``stored`` [R, G].

    Of double quantization, codes of a second map scaled per run of blocks.
    """
    count = math.prod(stored)
    absmax = tensors.read(f"{name}.absmax", (count,), stored=stored, part=part, kinds=_ABSMAX)
    if absmax.dtype != torch.uint8:
        return absmax.float()
    run = int(state["nested_blocksize"])
    codes = tensors.read(f"{name}.nested_quant_map", (256,)).float()
    outer = tensors.read(f"{name}.nested_absmax", (-(-count // run),)).float()
    runs = torch.arange(count, device=outer.device).view(stored) // run
    own = runs if part is None else taken(runs, part)
    return codes[absmax.int()] * outer[own] + float(state["nested_offset"])


def _read_state(tensors: Tensors, name: str) -> dict[str, Any]:
    data = tensors.read(name, tensors.shape(name), kinds=_BYTES)
    try:
        state = json.loads(bytes(data.cpu().tolist()))
        state["blocksize"] = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"tensor {name} cannot be read: {error!r}") from error
    return dict(state)
