"""SafetensorsWeights: a checkpoint in one or more mapped safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.checkpoints.kv_scales import read_kv_scales
from octavo.checkpoints.schemes.cut import Window, taken
from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.schemes.scheme import Scheme
from octavo.checkpoints.weights import Progress, check_shape, check_unused
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.weights import Part, Range, Rows, Stored

# safetensors' names of dtypes.
TENSOR_KINDS = {
    **DENSE_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class TensorFiles:
    """The tensors of safetensors files by name, each handed out on the device.

    ``dtype``: of dense matrices; None keeps the file's. ``take``: gives a file's tensor of that
    name on the device, in place of the mapped file; None: that is to be used.

    Raises:
        ModelLoadError: a file is cut short, or of another kind.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        progress: Progress,
        take: Callable[[Path, str], Tensor | None] | None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self._files, self._progress, self._take = files, progress, take
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in files:
            handle = open_safetensors(file, torch.device("cpu"))
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                self._where[name] = (file, handle)
        self._unused = set(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape.

        Raises:
            ModelLoadError: it is missing.
        """
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The tensor's dtype as safetensors names it.

        Raises:
            ModelLoadError: it is missing.
        """
        return str(self._slice(name).get_dtype())

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        part: Part | Window = None,
        stored: tuple[int, ...] | None = None,
        kinds: Mapping[str, torch.dtype] = DENSE_DTYPES,
    ) -> Tensor:
        """A tensor of the given shape, or a part of it, in ``dtype``; None keeps the file's.

        Of a part, the rest is neither read nor copied to the device. ``stored``: another shape of
        as many elements, which the result has and ``part`` is of.

        Raises:
            ModelLoadError: it is missing, misshapen, or of none of ``kinds``.
        """
        found = self._slice(name)
        file, handle = self._where[name]
        check_shape(file, name, found.get_shape(), shape)
        if (kind := found.get_dtype()) not in kinds:
            raise ModelLoadError(f"{file}: tensor {name} has type {kind}, not supported")
        if isinstance(part, Window) and part.covers(stored or shape):
            part = None
        try:
            there = None if self._take is None else self._take(file, name)
            # Else a map of the file, of which only what is used is read.
            tensor = handle.get_tensor(name) if there is None else there
        except SafetensorError as error:
            raise ModelLoadError(f"{file}: tensor {name}: {error}") from error
        tensor = tensor if stored is None else tensor.view(stored)
        if part is not None:
            tensor = taken(tensor, part)
            # On the device already, the rest is freed.
            tensor = tensor if there is None else tensor.clone()
        self._unused.discard(name)
        self._progress(tensor.nbytes)
        tensor = tensor.to(self.device)
        return tensor if dtype is None else tensor.to(dtype)

    def unread(self) -> set[str]:
        """The tensors that were not read."""
        return set(self._unused)

    def check_unused(self, ignored: set[str], scheme: Scheme) -> None:
        """Refuse tensors that were not read, are not ``ignored``, and mean nothing to the scheme.

        Raises:
            ModelLoadError: naming the first.
        """
        left = {name for name in self._unused - ignored if not scheme.is_spare(self, name)}
        check_unused(left, lambda name: self._where[name][0])

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            files = self._files
            where = files[0] if len(files) == 1 else files[0].parent
            raise ModelLoadError(f"{where}: tensor {name} is missing")
        return self._where[name][1].get_slice(name)


class SafetensorsWeights:
    """Weights from safetensors files, whose projections ``scheme`` reads.

    ``dtype``: of dense matrices; None keeps the file's. ``act_dtype``: of vectors. ``ignored``:
    names that may be there unused (a tied output head). ``take``: as TensorFiles has it.
    ``kv_scales``: static scales of keys and values are given, where there are any; else nothing
    asks for them.

    Raises:
        ModelLoadError: a file is cut short, or of another kind.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        act_dtype: torch.dtype,
        scheme: Scheme | None = None,
        ignored: Iterable[str] = (),
        progress: Progress = lambda _: None,
        take: Callable[[Path, str], Tensor | None] | None = None,
        kv_scales: bool = False,
    ) -> None:
        self.act_dtype = act_dtype
        self._has_kv_scales = kv_scales
        self._scheme = scheme or DenseScheme()
        self._ignored = set(ignored)
        self._tensors = TensorFiles(files, device=device, dtype=dtype, progress=progress, take=take)

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._scheme.linear(self._tensors, prefix, shape, part)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self._scheme.embedding(self._tensors, prefix, shape, part)

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        return self._scheme.experts(
            self._tensors, prefix, count, name, shape, part, own or (0, count)
        )

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        return self._tensors.read(name, (size,), dtype=self.act_dtype, part=part)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._tensors.read(name, shape, dtype=self.act_dtype)

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        if not self._has_kv_scales:
            return None
        return read_kv_scales(self._tensors, prefix, num_kv_heads)

    def num_rows(self, name: str) -> int:
        return self._tensors.shape(name)[0]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def leave_out(self, names: Iterable[str]) -> None:
        """Allow these tensors to stay unread."""
        self._ignored.update(names)

    def unread(self) -> set[str]:
        return self._tensors.unread()

    def finish(self, read: Collection[str] = ()) -> None:
        self._tensors.check_unused(self._ignored.union(read), self._scheme)


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
