"""Scheme: how a checkpoint's files store a projection, by its ``quantization_config``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from octavo.checkpoints.schemes.cut import Cut, Window, window
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.format import PlaneMap
from octavo.kernels.weights import Part, Planes, Range, Stored


class Tensors(Protocol):
    """The files' tensors by name; ``safetensors.TensorFiles`` is one.

    ``dtype``: of dense matrices; None keeps the file's. ``device``: of what is read.
    """

    dtype: torch.dtype | None
    device: torch.device

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str: ...

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        part: Part | Window = None,
        stored: tuple[int, ...] | None = None,
        kinds: Mapping[str, torch.dtype] = DENSE_DTYPES,
    ) -> Tensor: ...


class Scheme(ABC):
    """From a module's prefix to its weight, as ``Weights`` promises it.

    A scheme is made from the checkpoint's ``quantization_config`` and keeps no tensors. The tensors
    stored for a module decide whether it is quantized; the config, in which way. Its list of
    modules left out only repeats the files, and each tool matches it by a rule of its own.
    """

    @abstractmethod
    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        """A projection's weight [N, K].

        Raises:
            ModelLoadError: it is missing, misshapen, or of a type the scheme does not know.
        """

    def embedding(
        self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part
    ) -> Stored:
        """An embedding's table [V, D]: dense in most schemes. Raises as ``linear``."""
        return read_dense(tensors, prefix, shape, part)

    def experts(
        self,
        tensors: Tensors,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part,
        own: Range,
    ) -> Iterator[Stored]:
        """One projection [N, K] of experts ``own``; each is a module of its own in most schemes.

        A dense tensor of them all is a module's weight [E, N, K], as Granite stores it, or no
        module's: [E, N, K], as Qwen3.5 has it, or [E, K, N], as gpt-oss and Llama 4 do.
        """
        stacked = next(
            (key for key in (f"{prefix}.{name}.weight", f"{prefix}.{name}") if key in tensors), None
        )
        if stacked is None:
            for expert in range(*own):
                yield self.linear(tensors, f"{prefix}.{expert}.{name}", shape, part)
            return
        is_transposed = not stacked.endswith(".weight") and _is_transposed(tensors, prefix)
        (n, k), cut = shape, Cut.of(part, shape)
        # One range of rows at a time: joined, all experts would be held twice.
        windows = [window([own], [rows], [cut.columns]) for rows in cut.rows]
        if is_transposed:
            windows = [window([own], [cut.columns], [rows]) for rows in cut.rows]
        whole = (count, k, n) if is_transposed else (count, n, k)
        ranges = [tensors.read(stacked, whole, part=own_window) for own_window in windows]
        for pieces in zip(*ranges, strict=True):
            rows = [piece.T if is_transposed else piece for piece in pieces]
            # The whole is a map of the file: only what is computed with is read.
            weight = rows[0] if part is None else torch.cat(rows).contiguous()
            yield weight if tensors.dtype is None else weight.to(tensors.dtype)

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        """True for a tensor that may stay unread: a scale of activations, a bias of zeros."""
        return False


def _is_transposed(tensors: Tensors, prefix: str) -> bool:
    """True where the experts' tensors are [E, K, N].

    Of one alone that cannot be told where N is K. Otherwise gate and up have twice as many rows as
    down has columns; transposed both numbers are the model's width.
    """
    both = [f"{prefix}.{name}" for name in ("gate_up_proj", "down_proj")]
    if not all(name in tensors for name in both):
        return True
    gate_up, down = (tensors.shape(name) for name in both)
    return len(gate_up) != 3 or len(down) != 3 or gate_up[1] != 2 * down[2]


def read_dense(tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Tensor:
    """``prefix.weight`` [N, K] as it was trained.

    Raises:
        ModelLoadError: it is missing, misshapen, or not of floats.
    """
    return tensors.read(f"{prefix}.weight", shape, dtype=tensors.dtype, part=part)


def grouped(
    tensors: Tensors, prefix: str, format: str, planes: PlaneMap, shape: tuple[int, int]
) -> Planes:
    """A weight of a grouped format, or a part's cut of one: ``planes`` of this ``shape``.

    Dense weights in place of it are bfloat16 where dense ones keep their file's dtype.

    Raises:
        ModelLoadError: planes that do not fit the format or the shape.
    """
    try:
        return Planes(format, planes, shape, dtype=tensors.dtype or torch.bfloat16)
    except ValueError as error:
        raise ModelLoadError(f"{prefix}: {error}") from error
