"""Weights: where a model's constructor pulls its tensors from, by HF name.

Three sources: safetensors files, a GGUF file, and random numbers. A model asks for each tensor
once, with the shape it expects; ``finish`` then reports what the files hold and nobody asked for.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo._core import GgufFile
from octavo.checkpoints import gguf_names
from octavo.errors import ModelLoadError
from octavo.kernels.packed import BLOCK_FORMATS, QuantTensor

# Told of every tensor read: its bytes in the file.
Progress = Callable[[int], object]

# Old checkpoints store these; they follow from the config.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# Pages of a mapped file that may stay in memory while it is read.
_RELEASE_BYTES = 32 << 20
# Floats that are read as they are; everything else is a quantization.
FLOAT_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Protocol):
    """A checkpoint as a model sees it.

    ``act_dtype``: the type of activations. ``exact``: float32 arithmetic was asked for; quantized
    matrices must meet float activations.
    """

    act_dtype: torch.dtype
    exact: bool

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        """A weight [N, K]: a float tensor on the device, or as the file packs it.

        Raises:
            ModelLoadError: it is missing, misshapen, or of a type that cannot be computed with.
        """

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight or a bias, [size], in the type of the activations. Raises as above."""

    def finish(self) -> None:
        """All has been pulled.

        Raises:
            ModelLoadError: the checkpoint holds tensors the model has no use for.
        """


class SafetensorsWeights:
    """Tensors of one or more mapped safetensors files.

    ``dtype``: of matrices; None keeps the file's. ``act_dtype``: of vectors. ``ignored``: names
    that may be there unused (a tied output head). ``take``: gives a file's tensor of that name on
    the device, in place of the mapped file.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        act_dtype: torch.dtype,
        ignored: Iterable[str] = (),
        progress: Progress = lambda _: None,
        take: Callable[[Path, str], Tensor] | None = None,
    ) -> None:
        self._device, self._dtype, self.act_dtype = device, dtype, act_dtype
        self.exact = False
        self._progress, self._take = progress, take
        self._ignored = set(ignored)
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in files:
            handle = open_safetensors(file, device)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                self._where[name] = (file, handle)
        self._unused = set(self._where)
        self._files = files

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        return self._read(name, shape, self._dtype)

    def vector(self, name: str, size: int) -> Tensor:
        return self._read(name, (size,), self.act_dtype)

    def num_rows(self, name: str) -> int:
        """The first size of a tensor that no config tells. Raises as ``matrix``."""
        if name not in self._where:
            raise ModelLoadError(f"{_names(self._files)}: tensor {name} is missing")
        return int(self._where[name][1].get_slice(name).get_shape()[0])

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def finish(self) -> None:
        _check_unused(self._unused - self._ignored, lambda name: self._where[name][0])

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        if name not in self._where:
            raise ModelLoadError(f"{_names(self._files)}: tensor {name} is missing")
        file, handle = self._where[name]
        found = handle.get_slice(name)
        _check_shape(file, name, tuple(found.get_shape()), shape)
        if (kind := found.get_dtype()) not in FLOAT_KINDS:
            raise ModelLoadError(f"{file}: tensor {name} has type {kind}, not supported")
        try:
            tensor: Tensor = self._take(file, name) if self._take else handle.get_tensor(name)
        except SafetensorError as error:
            raise ModelLoadError(f"{file}: tensor {name}: {error}") from error
        self._unused.discard(name)
        self._progress(tensor.nbytes)
        return tensor if dtype is None else tensor.to(dtype)


class RenamedWeights:
    """A checkpoint that spells its tensors another way.

    ``rename``: the name that a model asks for -> the file's.
    """

    def __init__(self, weights: SafetensorsWeights, rename: Callable[[str], str]) -> None:
        self._weights, self._rename = weights, rename
        self.act_dtype, self.exact = weights.act_dtype, weights.exact

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        return self._weights.matrix(self._rename(name), shape)

    def vector(self, name: str, size: int) -> Tensor:
        return self._weights.vector(self._rename(name), size)

    def num_rows(self, name: str) -> int:
        """As SafetensorsWeights.num_rows."""
        return self._weights.num_rows(self._rename(name))

    def finish(self) -> None:
        self._weights.finish()


class GgufWeights:
    """Tensors of a mapped GGUF file, under their HF names, rows in HF's order.

    ``packed``: quantized matrices come as QuantTensors, bytes of the map, and ``dtype`` is for the
    rest; without it everything is dequantized to ``dtype``. ``heads``: (num_heads, num_kv_heads).
    """

    def __init__(
        self,
        file: GgufFile,
        *,
        heads: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype | None,
        act_dtype: torch.dtype,
        packed: bool,
        exact: bool = False,
        progress: Progress = lambda _: None,
    ) -> None:
        self._file, self._device = file, device
        self._dtype, self.act_dtype = dtype, act_dtype
        self._packed, self.exact = packed, exact
        self._progress = progress
        self._tensors = file.tensors()
        # llama.cpp stores Llama's queries and keys with the two halves of a head interleaved.
        self._arch = str(file.metadata().get("general.architecture"))
        interleaved = self._arch in gguf_names.INTERLEAVED
        self._heads = {"q_proj": heads[0], "k_proj": heads[1]} if interleaved else {}
        self._unused = set(self._tensors) - gguf_names.IGNORED
        self._read_bytes = 0

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        gguf_name, kind, nbytes = self._take(name, shape)
        order = self._row_order(name, shape[0])
        if self._packed and kind not in FLOAT_KINDS:
            data = self._bytes(gguf_name)
            self._progress(nbytes)
            return QuantTensor(data=data, kind=kind, shape=shape, row_permutation=order)
        return self._floats(gguf_name, kind, shape, order, self._dtype, nbytes)

    def vector(self, name: str, size: int) -> Tensor:
        gguf_name, kind, nbytes = self._take(name, (size,))
        order = self._row_order(name, size)
        return self._floats(gguf_name, kind, (size,), order, self.act_dtype, nbytes)

    def finish(self) -> None:
        self._file.release_pages()
        _check_unused(self._unused, lambda _: Path(self._file.path))

    def _take(self, name: str, shape: tuple[int, ...]) -> tuple[str, str, int]:
        gguf_name = gguf_names.from_hf(name, self._arch)
        if gguf_name not in self._tensors:
            raise ModelLoadError(f"{self._file.path}: tensor {gguf_name} is missing")
        found, kind, _offset, nbytes = self._tensors[gguf_name]
        _check_shape(self._file.path, gguf_name, found, shape)
        if kind not in BLOCK_FORMATS:
            raise ModelLoadError(
                f"{self._file.path}: tensor {gguf_name} has type {kind}, not supported"
            )
        self._unused.discard(gguf_name)
        self._read_bytes += nbytes
        if self._read_bytes > _RELEASE_BYTES:
            # Earlier tensors are packed by now, and a view that is not reads the file again.
            self._file.release_pages()
            self._read_bytes = nbytes
        return gguf_name, kind, nbytes

    def _row_order(self, name: str, num_rows: int) -> Tensor | None:
        num_heads = self._heads.get(name.split(".")[-2])
        return None if num_heads is None else gguf_names.deinterleaved_rows(num_rows, num_heads)

    def _bytes(self, gguf_name: str) -> Tensor:
        with warnings.catch_warnings():
            # torch has no read-only tensors and says so; nothing writes to these.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._file.data(gguf_name), dtype=torch.uint8)

    def _floats(
        self,
        gguf_name: str,
        kind: str,
        shape: tuple[int, ...],
        order: Tensor | None,
        dtype: torch.dtype | None,
        nbytes: int,
    ) -> Tensor:
        if dtype is None:
            dtype = FLOAT_KINDS.get(kind, self.act_dtype)
        out = torch.empty(math.prod(shape), dtype=torch.float32)
        self._file.dequantize(gguf_name, out.numpy())
        out = out.view(shape)
        if order is not None:
            out = out[order]
        self._progress(nbytes)
        return out.to(device=self._device, dtype=dtype)


class DummyWeights:
    """Random weights, the same each time, made on the device.

    One pattern of numbers in [-1, 1], repeated through all tensors: filling 8B parameters costs a
    copy each. Matrices are scaled to keep a signal's variance, so activations stay finite.
    """

    # Prime, so that a matrix's rows are all different.
    PATTERN_LEN = 4_194_301

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        act_dtype: torch.dtype,
        progress: Progress = lambda _: None,
    ) -> None:
        self._device, self._dtype, self.act_dtype = device, dtype, act_dtype
        self.exact = False
        self._progress = progress
        generator = torch.Generator().manual_seed(0)
        pattern = torch.empty(self.PATTERN_LEN).uniform_(-1, 1, generator=generator)
        self._pattern = pattern.to(device)
        self._at = 0

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantTensor:
        return self._fill(shape, math.sqrt(3 / shape[1]), self._dtype)

    def vector(self, name: str, size: int) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=self.act_dtype, device=self._device)
        return self._fill((size,), 0.02, self.act_dtype)

    def finish(self) -> None:
        return

    def _fill(self, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=self._device)
        flat, filled = out.view(-1), 0
        while filled < flat.numel():
            n = min(self.PATTERN_LEN - self._at, flat.numel() - filled)
            piece = self._pattern[self._at : self._at + n]
            torch.mul(piece, scale, out=flat[filled : filled + n])
            filled += n
            self._at = (self._at + n) % self.PATTERN_LEN
        self._progress(out.nbytes)
        return out


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, else every ``model*.safetensors``.

    Raises:
        ModelLoadError: a file the index names is not there, or the index cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index}: not a safetensors index: {error!r}") from error
        for file in files:
            if file.parent != folder or not file.is_file():
                raise ModelLoadError(f"{index}: names {file.name}, which is not in {folder}")
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    # Mistral's own format under another name would hold every tensor twice.
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a safetensors file: bytes [begin, end), counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(file: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file as they lie in it, without gaps.

    Raises:
        ModelLoadError: it is cut short, or of another kind.
    """
    open_safetensors(file, torch.device("cpu"))  # checks the header
    with file.open("rb") as stream:
        header_len = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_len))
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        begin, end = (8 + header_len + offset for offset in entry["data_offsets"])
        entries.append(TensorEntry(name, entry["dtype"], tuple(entry["shape"]), begin, end))
    return sorted(entries, key=lambda entry: (entry.begin, entry.end))


def open_safetensors(file: Path, device: torch.device) -> Any:
    """A mapped file, whose header has been read.

    Raises:
        ModelLoadError: it is cut short, or of another kind.
    """
    try:
        return safe_open(str(file), framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file}: not a whole safetensors file: {error}") from error


def _check_shape(
    file: Path | str, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    if tuple(found) != expected:
        raise ModelLoadError(
            f"{file}: tensor {name} has shape {list(found)}, the config says {list(expected)}"
        )


def _check_unused(names: set[str], file_of: Callable[[str], Path]) -> None:
    extra = sorted(n for n in names if not n.endswith(_DERIVED_SUFFIXES))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ModelLoadError(
            f"{file_of(extra[0])}: tensor {extra[0]} is not part of this model{more}"
        )


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else str(files[0].parent)
