"""CompressedTensorsScheme: files of llm-compressor, in several formats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.checkpoints.schemes.cut import Cut, window, words_of
from octavo.checkpoints.schemes.fp4 import read_factor, read_fp4
from octavo.checkpoints.schemes.gptq import read_group_map
from octavo.checkpoints.schemes.packing import WORDS, num_words, unpack
from octavo.checkpoints.schemes.scaled import (
    FP8_KINDS,
    INT8_KINDS,
    read_scaled,
    read_scales,
    scale_columns,
)
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Stored

# Classes that targets and ignore name a projection by.
_CLASSES = ("Linear",)
_FORMATS = {
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
}
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_BITS = (2, 3, 4, 8)
# Shapes, and what quantizes activations, keys and values, which stay floats here.
_SPARE = (
    ".weight_shape",
    ".weight_zero_point",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """A config group's weights. ``block``: (rows, columns) of one scale; None: all, or a row."""

    bits: int
    block: tuple[int, int] | None
    symmetric: bool
    floats: bool

    @classmethod
    def read(cls, name: str, values: Mapping[str, Any]) -> WeightArgs:
        """The ``weights`` of the config group ``name``.

        Raises:
            ModelLoadError: a value that is not read.
        """
        strategy = values.get("strategy") or "tensor"
        if strategy not in _STRATEGIES:
            raise ModelLoadError(f"compressed-tensors: {name}: strategy {strategy!r} is not read")
        block = None
        if strategy == "group":
            block = (1, int(values["group_size"]))
        elif strategy == "block":
            rows, columns = values["block_structure"]
            block = (int(rows), int(columns))
        bits = int(values.get("num_bits", 8))
        if bits not in _BITS:
            raise ModelLoadError(f"compressed-tensors: {name}: {bits} bits are not read")
        floats = values.get("type", "int") == "float"
        return cls(bits, block, bool(values.get("symmetric", True)), floats)


class CompressedTensorsScheme(Scheme):
    """The module's config group, by ``targets`` and ``ignore``, and its tensors.

    Both lists hold names, regexes after "re:" (matched at a name's beginning), or class names. The
    activations' quantization is left out: products are of float activations.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        for name, value in (("transform_config", "config_groups"), ("sparsity_config", "format")):
            found = (config.get(name) or {}).get(value)
            if found and found != "dense":
                raise ModelLoadError(
                    f"compressed-tensors: {name} is not read; quantize the model anew without it"
                )
        self._ignore: Sequence[str] = config.get("ignore") or ()
        self._groups: list[tuple[Sequence[str], WeightArgs]] = []
        for name, group in (config.get("config_groups") or {}).items():
            form = group.get("format") or config.get("format") or "mixed-precision"
            if form not in _FORMATS:
                raise ModelLoadError(
                    f"compressed-tensors: format {form!r} is not read; quantize the model anew to "
                    "pack-quantized or float-quantized"
                )
            if group.get("weights"):
                args = WeightArgs.read(name, group["weights"])
                self._groups.append((group.get("targets") or ("Linear",), args))

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        args = self._args(prefix)
        if args is None:
            return read_dense(tensors, prefix, shape, part)
        packed = f"{prefix}.weight_packed"
        if packed in tensors and args.floats:
            name = f"{prefix}.weight_global_scale"
            # It divides.
            factor = 1 / read_factor(tensors, name) if name in tensors else None
            return read_fp4(tensors, prefix, shape, part, packed=packed, factor=factor)
        if packed in tensors:
            return _read_packed(tensors, prefix, shape, part, args)
        weight = f"{prefix}.weight"
        if weight not in tensors or tensors.kind(weight) not in (*FP8_KINDS, *INT8_KINDS):
            return read_dense(tensors, prefix, shape, part)
        return read_scaled(
            tensors,
            prefix,
            shape,
            part,
            scale=f"{prefix}.weight_scale",
            block=args.block,
            zero=None if args.symmetric else f"{prefix}.weight_zero_point",
        )

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return name.endswith(_SPARE)

    def _args(self, prefix: str) -> WeightArgs | None:
        """Those of the module's group: one that names it goes before one that names its class."""
        if _matches(prefix, self._ignore, _CLASSES):
            return None
        for classes in ((), _CLASSES):
            for targets, args in self._groups:
                if _matches(prefix, targets, classes):
                    return args
        return None


def _matches(prefix: str, patterns: Sequence[str], classes: Sequence[str]) -> bool:
    return any(
        re.match(pattern[3:], prefix) is not None
        if pattern.startswith("re:")
        else pattern == prefix or pattern in classes
        for pattern in patterns
    )


def _read_packed(
    tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part, args: WeightArgs
) -> Stored:
    """weight_packed int32 [N, K bits / 32], weight_zero_point int32 [N bits / 32, G] if asymmetric.

    Both hold numbers around zero, raised by half their range; the zero point of a symmetric weight
    is that half.
    """
    (n, k), bits, cut = shape, args.bits, Cut.of(part, shape)
    scale = f"{prefix}.weight_scale"
    size = scale_columns(tensors, scale, shape, args.block)
    groups, planes = read_group_map(tensors, f"{prefix}.weight_g_idx", cut, shape, size)
    along = words_of([cut.columns], bits)
    words = tensors.read(
        f"{prefix}.weight_packed",
        (n, num_words(k, bits)),
        part=window(cut.rows, along.stored),
        kinds=WORDS,
    )
    planes |= {
        "q": unpack(words, along, bits),
        "scale": read_scales(tensors, scale, shape, args.block, cut.rows, groups),
    }
    if args.symmetric:
        planes["q"] = (planes["q"] - (1 << bits - 1)).view(torch.int8)
    else:
        rows = words_of(cut.rows, bits)
        zeros = tensors.read(
            f"{prefix}.weight_zero_point",
            (num_words(n, bits), -(-k // size)),
            part=window(rows.stored, [groups]),
            kinds=WORDS,
        )
        planes["zero"] = unpack(zeros.t(), rows, bits).t().contiguous()
    return grouped(tensors, prefix, f"INT{bits}", planes, cut.shape)
