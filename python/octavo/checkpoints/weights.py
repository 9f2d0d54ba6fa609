"""Weights: a checkpoint's weights for a model's constructor, by their module's name in HF's files.

A model asks for each weight once, with the shape it expects; ``finish`` then reports tensors that
were never asked for. Implementations: safetensors, gguf and dummy, and quantize over them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Range, Rows, Stored

# Called for every tensor read with its bytes in the file.
Progress = Callable[[int], object]

# Old checkpoints store these; they follow from the config.
_DERIVED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".masked_bias",
    ".attn.bias",
    # Of MiniMax's lightning attention.
    ".slope_rate",
    ".query_decay",
    ".key_decay",
    ".diagonal_decay",
)


class Weights(Protocol):
    """A checkpoint as a model sees it.

    ``act_dtype``: of activations. ``part``: a shard's part of a weight; ``shape`` and ``size`` are
    the whole's.
    """

    act_dtype: torch.dtype

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        """The weight [N, K] of the projection ``prefix``: dense on the device, or quantized.

        Raises:
            ModelLoadError: it is missing, misshapen, or of a type that cannot be computed with.
        """

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        """The table [V, D] of the embedding ``prefix``. Raises as ``linear``."""

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        """The projection ``name`` [N, K] of each of ``count`` experts below ``prefix``, in order.

        Each is read when it is taken, from a module of its own or from a tensor of them all.
        ``own``: the range of them that are a shard's; None: all.
        Raises as ``linear``.
        """

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        """The tensor ``name``, a norm's weight or a bias: [size] in ``act_dtype``.

        Raises as ``linear``.
        """

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name`` of any other kind, whole, in ``act_dtype``. Raises as ``linear``."""

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        """Static scales float32 [2, num_kv_heads] of the keys and values of the attention
        ``prefix``; None where there are none, or they are not asked for. Raises as ``linear``.
        """

    def unread(self) -> set[str]:
        """The tensors that nothing has asked for so far, as the files name them."""

    def finish(self, read: Collection[str] = ()) -> None:
        """Check that everything has been pulled, here or, as ``read``, by another stage.

        Raises:
            ModelLoadError: the checkpoint holds tensors the model has no use for.
        """


class NamedWeights(Weights, Protocol):
    """A checkpoint that also gives sizes which no config holds."""

    def num_rows(self, name: str) -> int:
        """The first size of the tensor ``name``.

        Raises:
            ModelLoadError: it is missing.
        """


W = TypeVar("W", bound=Weights)


class RenamedWeights(Generic[W]):
    """A checkpoint with other names for its modules.

    ``rename``: the name that a model asks for -> the file's.
    """

    def __init__(self, weights: W, rename: Callable[[str], str]) -> None:
        self._weights, self._rename = weights, rename
        self.act_dtype = weights.act_dtype

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._weights.linear(self._rename(prefix), shape, part)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._weights.embedding(self._rename(prefix), shape, part)

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        return self._weights.experts(self._rename(prefix), count, name, shape, part, own)

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        return self._weights.vector(self._rename(name), size, part)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._weights.tensor(self._rename(name), shape)

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        return self._weights.kv_scales(self._rename(prefix), num_kv_heads)

    def unread(self) -> set[str]:
        return self._weights.unread()

    def finish(self, read: Collection[str] = ()) -> None:
        self._weights.finish(read)


class RenamedSizedWeights(RenamedWeights[NamedWeights]):
    """The same of one that gives sizes."""

    def num_rows(self, name: str) -> int:
        return self._weights.num_rows(self._rename(name))


def check_shape(
    file: Path | str, name: str, found: Sequence[int], expected: tuple[int, ...]
) -> None:
    """Refuse a tensor whose shape is not the config's.

    Raises:
        ModelLoadError: naming the tensor and its file.
    """
    if tuple(found) != expected:
        raise ModelLoadError(
            f"{file}: tensor {name} has shape {list(found)}, the config says {list(expected)}"
        )


def check_unused(names: set[str], file_of: Callable[[str], Path]) -> None:
    """Refuse tensors that no part of the model has asked for.

    Raises:
        ModelLoadError: naming the first and its file.
    """
    extra = sorted(n for n in names if not n.endswith(_DERIVED_SUFFIXES))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ModelLoadError(
            f"{file_of(extra[0])}: tensor {extra[0]} is not part of this model{more}"
        )
