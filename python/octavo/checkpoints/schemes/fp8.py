"""Fp8Scheme: FP8 weights of DeepSeek, Qwen and transformers (``fp8``), and of FBGEMM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.checkpoints.schemes.scaled import FP8_KINDS, read_scaled
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Stored

# Of activations, which stay floats here.
_SPARE = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")


class Fp8Scheme(Scheme):
    """weight float8 [N, K] times weight_scale_inv, or weight_scale: both multiply.

    One scale for all, for a row [N, 1], or for a block of ``weight_block_size`` (rows, columns),
    which N and K need not be multiples of.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        block = config.get("weight_block_size")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ModelLoadError(f"fp8: weight_block_size {block} is not two positive numbers")
        self._block = None if block is None else (int(block[0]), int(block[1]))

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        weight = f"{prefix}.weight"
        if weight not in tensors or tensors.kind(weight) not in FP8_KINDS:
            return read_dense(tensors, prefix, shape, part)
        scale = f"{weight}_scale_inv"
        if scale not in tensors:
            scale = f"{weight}_scale"
        return read_scaled(tensors, prefix, shape, part, scale=scale, block=self._block)

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return name.endswith(_SPARE)
