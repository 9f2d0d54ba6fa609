"""Scheme: how a checkpoint's files store a projection, by its ``quantization_config``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.weights import Part, Stored


class Tensors(Protocol):
    """The files' tensors by name; ``safetensors.TensorFiles`` is one.

    ``dtype``: of dense matrices; None keeps the file's.
    """

    dtype: torch.dtype | None

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        part: Part = None,
        kinds: Mapping[str, torch.dtype] = DENSE_DTYPES,
    ) -> Tensor: ...


class Scheme(ABC):
    """From a module's prefix to its weight, as ``Weights`` promises it.

    A scheme is made from the checkpoint's ``quantization_config`` and keeps no tensors.
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
        return tensors.read(f"{prefix}.weight", shape, dtype=tensors.dtype, part=part)

    def experts(
        self,
        tensors: Tensors,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part,
    ) -> Iterator[Stored]:
        """One projection [N, K] of every expert; each is a module of its own in most schemes."""
        for expert in range(count):
            yield self.linear(tensors, f"{prefix}.{expert}.{name}", shape, part)
