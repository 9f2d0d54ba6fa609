"""GptqScheme: GPTQ files of AutoGPTQ and GPTQModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cut, window, words_of
from octavo.checkpoints.schemes.packing import WORDS, num_words, unpack
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, grouped, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.formats.grouped import group_map
from octavo.kernels.weights import Part, Range, Stored

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class GptqModule:
    """Parameters of one module. ``group_size`` -1: the whole of K."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ModelLoadError(f"gptq: {self.bits} bits are not read, only {_BITS}")
        if self.group_size < 1 and self.group_size != -1:
            raise ModelLoadError(f"gptq: group_size {self.group_size} is neither positive nor -1")


class GptqScheme(Scheme):
    """qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32], scales [G, N], g_idx [K].

    Values are packed along K, zero points along N. ``checkpoint_format`` gptq (v1) stores zero
    points less one, gptq_v2 as they are. ``dynamic``: a regex at a name's beginning -> its own bits
    and group_size. Column k belongs to group g_idx[k], in whatever order desc_act left them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("is_marlin_format"):
            raise ModelLoadError("gptq: Marlin's own layout is not read; convert it to gptq")
        self._module = module_of(config)
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if form not in _FORMATS:
            raise ModelLoadError(
                f"gptq: checkpoint_format {form!r} is not read; convert it to gptq or gptq_v2"
            )
        self._zero_offset = 1 if form == "gptq" else 0
        self._dynamic: Mapping[str, Mapping[str, Any]] = config.get("dynamic") or {}

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        if f"{prefix}.qweight" not in tensors:
            return read_dense(tensors, prefix, shape, part)
        return read_gptq(tensors, prefix, shape, part, self._of(prefix), self._zero_offset)

    def _of(self, prefix: str) -> GptqModule:
        for pattern, values in self._dynamic.items():
            if re.match(pattern.removeprefix("+:"), prefix):
                return replace(
                    self._module,
                    **{key: values[key] for key in ("bits", "group_size") if key in values},
                )
        return self._module

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return is_zero_bias(tensors, name)


def module_of(config: Mapping[str, Any]) -> GptqModule:
    """The parameters of modules that have none of their own."""
    return GptqModule(int(config["bits"]), int(config.get("group_size", -1)))


def read_gptq(
    tensors: Tensors,
    prefix: str,
    shape: tuple[int, int],
    part: Part,
    module: GptqModule,
    zero_offset: int,
) -> Stored:
    """A weight in GPTQ's layout; ``zero_offset`` is added to stored zero points, modulo 2^bits."""
    (n, k), bits, cut = shape, module.bits, Cut.of(part, shape)
    size = k if module.group_size == -1 else module.group_size
    height = -(-k // size)
    groups, planes = read_group_map(tensors, f"{prefix}.g_idx", cut, shape, size)
    columns, rows = words_of([cut.columns], bits), words_of(cut.rows, bits)
    words = tensors.read(
        f"{prefix}.qweight",
        (num_words(k, bits), n),
        part=window(columns.stored, cut.rows),
        kinds=WORDS,
    )
    zeros = tensors.read(
        f"{prefix}.qzeros",
        (height, num_words(n, bits)),
        part=window([groups], rows.stored),
        kinds=WORDS,
    )
    scales = tensors.read(f"{prefix}.scales", (height, n), part=window([groups], cut.rows))
    zero = unpack(zeros, rows, bits) + zero_offset & (1 << bits) - 1
    planes |= {
        "q": unpack(words.t(), columns, bits),
        "scale": scales.t().contiguous(),
        "zero": zero.t().contiguous(),
    }
    return grouped(tensors, prefix, f"INT{bits}", planes, cut.shape)


def read_group_map(
    tensors: Tensors, name: str, cut: Cut, shape: tuple[int, int], size: int
) -> tuple[Range, dict[str, Tensor]]:
    """The groups of a cut's columns, and their plane "group": of ``name`` int32 [K] where it is
    stored, set, and another than runs of ``size``; then a column may be of any group.
    """
    k = shape[1]
    if name in tensors:
        stored = tensors.read(name, (k,), part=window([cut.columns]), kinds=WORDS)
        runs = torch.arange(*cut.columns, device=stored.device) // size
        is_set = not bool((stored == -1).all())
        if is_set and not torch.equal(stored, runs.int()):
            return (0, -(-k // size)), {"group": stored}
    return cut.groups(size), group_map(cut.columns, size, tensors.device)


def is_zero_bias(tensors: Tensors, name: str) -> bool:
    """True for a bias of zeros: AutoGPTQ stored one for every module."""
    return name.endswith(".bias") and not bool(tensors.read(name, tensors.shape(name)).any())
