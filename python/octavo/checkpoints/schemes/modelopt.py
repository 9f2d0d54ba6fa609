"""ModelOptScheme: NVIDIA ModelOpt's FP8 and NVFP4 files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.checkpoints.schemes.fp4 import read_factor, read_fp4
from octavo.checkpoints.schemes.scaled import FP8_KINDS, read_scaled
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Stored

_ALGORITHMS = (
    "FP8",
    "FP8_PB_WO",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "MIXED_PRECISION",
    "NVFP4",
    "W4A16_NVFP4",
)
# Of FP8_PB_WO, (rows, columns) of one scale.
_BLOCK = (128, 128)
# Of activations, keys and values, which stay floats here.
_SPARE = (".input_scale", ".k_scale", ".v_scale")


class ModelOptScheme(Scheme):
    """weight float8 [N, K] times weight_scale; or 4-bit floats, times weight_scale_2 as well.

    The module's own tensors give its kind.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        algorithm = config.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise ModelLoadError(
                f"modelopt: quant_algo {algorithm!r} is not read; export it as FP8 or NVFP4"
            )
        self._block = _BLOCK if algorithm == "FP8_PB_WO" else None

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        weight = f"{prefix}.weight"
        kind = tensors.kind(weight) if weight in tensors else ""
        if kind == "U8":
            factor = read_factor(tensors, f"{weight}_scale_2")
            return read_fp4(tensors, prefix, shape, part, packed=weight, factor=factor)
        if kind in FP8_KINDS:
            scale = f"{weight}_scale"
            return read_scaled(tensors, prefix, shape, part, scale=scale, block=self._block)
        return read_dense(tensors, prefix, shape, part)

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return name.endswith(_SPARE)
