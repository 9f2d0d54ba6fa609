"""BitsAndBytesScheme: bitsandbytes' nf4, fp4 and int8 files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.weights import Part, Stored

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
    q = tensors.read(f"{prefix}.weight", shape, kinds={"I8": torch.int8})
    absmax = tensors.read(f"{prefix}.SCB", (shape[0],))
    planes = {"q": q, "scale": absmax.float()[:, None] / _INT8_MAX}
    return grouped(tensors, prefix, "INT8", planes, shape, part)


def _read_4bit(
    tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part, kind: str
) -> Stored:
    (n, k), name = shape, f"{prefix}.weight"
    state = _read_state(tensors, f"{name}.quant_state.bitsandbytes__{kind}")
    if tuple(state.get("shape", ())) != shape:
        raise ModelLoadError(
            f"tensor {name} holds shape {state.get('shape')}, the config says {list(shape)}"
        )
    packed = tensors.read(name, tensors.shape(name), kinds=_STORAGE).flatten().view(torch.uint8)
    if packed.numel() != -(-n * k // 2):
        raise ModelLoadError(f"tensor {name} holds {packed.numel()} bytes for {n} x {k} of 4 bits")
    q = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: n * k].view(n, k)
    block = int(state["blocksize"])
    absmax = _read_absmax(tensors, name, -(-n * k // block), state)
    codes = tensors.read(f"{name}.quant_map", (16,)).float()
    planes = {"q": q, "codes": codes}
    if k % block == 0:
        planes["scale"] = absmax.view(n, -1)
    else:
        # A block ends inside of a row and goes on in the next: a scale for each element.
        planes["scale"] = absmax.repeat_interleave(block)[: n * k].view(n, k)
    return grouped(tensors, prefix, _FORMATS[kind], planes, shape, part)


def _read_absmax(tensors: Tensors, name: str, blocks: int, state: Mapping[str, Any]) -> Tensor:
    """float32 [blocks]; of double quantization, codes of a second map scaled per run of blocks."""
    absmax = tensors.read(f"{name}.absmax", (blocks,), kinds=_ABSMAX)
    if absmax.dtype != torch.uint8:
        return absmax.float()
    run = int(state["nested_blocksize"])
    codes = tensors.read(f"{name}.nested_quant_map", (256,)).float()
    outer = tensors.read(f"{name}.nested_absmax", (-(-blocks // run),)).float()
    return codes[absmax.int()] * outer.repeat_interleave(run)[:blocks] + float(
        state["nested_offset"]
    )


def _read_state(tensors: Tensors, name: str) -> dict[str, Any]:
    data = tensors.read(name, tensors.shape(name), kinds=_BYTES)
    try:
        state = json.loads(bytes(data.cpu().tolist()))
        state["blocksize"] = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"tensor {name} cannot be read: {error!r}") from error
    return dict(state)
