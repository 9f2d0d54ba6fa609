"""GgufWeights: a checkpoint in a mapped GGUF file."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from octavo._core import GgufFile
from octavo.checkpoints import gguf_names
from octavo.checkpoints.weights import Progress, check_shape, check_unused
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.formats.gguf_grids import GRIDS
from octavo.kernels.weights import (
    Columns,
    Part,
    Planes,
    Range,
    Rows,
    Stored,
    dense,
    part_of,
    rows_of,
)

# Pages of a mapped file that may stay in memory while it is read.
_RELEASE_BYTES = 32 << 20


class GgufWeights:
    """Tensors of a mapped GGUF file, under their HF names, rows in HF's order.

    ``packed``: quantized matrices come as Planes, bytes of the map, and ``dtype`` is for the rest;
    without it everything is dequantized to ``dtype``. ``unpacked``: in place of a ``dtype`` of
    None, for kinds that no backend has kernels for (IQ1, IQ2, IQ3, TQ). ``heads``: (num_heads,
    num_kv_heads).
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
        unpacked: torch.dtype = torch.bfloat16,
        progress: Progress = lambda _: None,
    ) -> None:
        self._file, self._device = file, device
        self._dtype, self.act_dtype = dtype, act_dtype
        self._packed, self._unpacked = packed, unpacked
        self._progress = progress
        self._tensors = file.tensors()
        # llama.cpp stores Llama's queries and keys with the two halves of a head interleaved.
        metadata = file.metadata()
        self._arch = arch = str(metadata.get("general.architecture"))
        self._tiled = gguf_names.TiledHeads.of(metadata)
        interleaved = self._arch in gguf_names.INTERLEAVED
        self._heads = {"q_proj": heads[0], "k_proj": heads[1]} if interleaved else {}
        # Blocks that predict further tokens come after the layers.
        num_blocks = int(metadata.get(f"{arch}.block_count") or 0)
        further = int(metadata.get(f"{arch}.nextn_predict_layers") or 0)
        others = tuple(f"blk.{num_blocks - i - 1}." for i in range(further))
        names = (name for name in self._tensors if not name.startswith(others))
        self._unused = set(names) - gguf_names.IGNORED
        self._read_bytes = 0

    def linear(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        name = f"{prefix}.weight"
        if (unfolding := self._unfolding(name, shape)) is not None:
            return part_of(unfolding, part)
        gguf_name, kind, nbytes = self._take(name, shape)
        order = self._row_order(name, shape[0])
        if self._packed and kind not in DENSE_DTYPES and kind not in GRIDS:
            blocks = self._bytes(gguf_name).view(shape[0], -1)
            self._progress(nbytes)
            return part_of(Planes(kind, {"blocks": blocks}, shape, order), part)
        if part is not None and kind in DENSE_DTYPES:
            return self._dense_part(gguf_name, kind, shape, order, part)
        return part_of(self._floats(gguf_name, kind, shape, order, self._dtype, nbytes), part)

    def _dense_part(
        self,
        gguf_name: str,
        kind: str,
        shape: tuple[int, int],
        order: Tensor | None,
        part: Rows | Columns,
    ) -> Tensor:
        """A part of a dense matrix [N, K], of which no more is read."""
        whole = self._bytes(gguf_name).view(DENSE_DTYPES[kind]).view(shape)
        if order is not None and isinstance(part, Rows):
            found = whole[rows_of(order, part)]
        else:
            found = dense(part_of(whole, part))
            found = found if order is None else found[order]
        self._progress(found.nbytes)
        return found.to(device=self._device, dtype=self._dtype or DENSE_DTYPES[kind], copy=True)

    def embedding(self, prefix: str, shape: tuple[int, int], part: Part = None) -> Stored:
        return self.linear(prefix, shape, part)

    def experts(
        self,
        prefix: str,
        count: int,
        name: str,
        shape: tuple[int, int],
        part: Part = None,
        own: Range | None = None,
    ) -> Iterator[Stored]:
        file_name = f"{prefix}.{name}.weight"
        gguf_name, rows, part = self._half(file_name, shape, part)
        gguf_name, kind, nbytes = self._take_named(gguf_name, (count, rows, shape[1]))
        shape = (rows, shape[1])
        chosen = slice(*(own or (0, count)))
        if self._packed and kind not in DENSE_DTYPES and kind not in GRIDS:
            for blocks in self._bytes(gguf_name).view(count, shape[0], -1)[chosen]:
                self._progress(nbytes // count)
                yield part_of(Planes(kind, {"blocks": blocks}, shape), part)
            return
        weights = self._floats(gguf_name, kind, (count, *shape), None, self._dtype, nbytes)
        for weight in weights[chosen]:
            yield part_of(weight, part)

    def vector(self, name: str, size: int, part: Rows | None = None) -> Tensor:
        gguf_name, kind, nbytes = self._take(name, (size,))
        order = self._row_order(name, size)
        vector = self._parameter(name, gguf_name, kind, (size,), order, nbytes)
        return vector if part is None else rows_of(vector, part)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        gguf_name, kind, nbytes = self._take(name, shape)
        order = self._row_order(name, shape[0])
        return self._parameter(name, gguf_name, kind, shape, order, nbytes)

    def _parameter(
        self,
        name: str,
        gguf_name: str,
        kind: str,
        shape: tuple[int, ...],
        order: Tensor | None,
        nbytes: int,
    ) -> Tensor:
        """A tensor in the type of activations, decays as HF's files have them."""
        if not name.endswith(gguf_names.DECAY):
            return self._floats(gguf_name, kind, shape, order, self.act_dtype, nbytes)
        rates = self._floats(gguf_name, kind, shape, order, torch.float32, nbytes)
        return torch.log(-rates).to(self.act_dtype)

    def named(self, gguf_name: str, shape: tuple[int, ...]) -> Tensor:
        """As ``tensor``, by the file's own name."""
        _, kind, nbytes = self._take_named(gguf_name, shape)
        return self._floats(gguf_name, kind, shape, None, self.act_dtype, nbytes)

    def num_rows(self, name: str) -> int:
        """See NamedWeights."""
        gguf_name = gguf_names.from_hf(name, self._arch)
        if gguf_name not in self._tensors:
            raise ModelLoadError(f"{self._file.path}: tensor {gguf_name} is missing")
        return self._tensors[gguf_name][0][0]

    def __contains__(self, name: str) -> bool:
        """True if the file has a tensor that HF's files call ``name``."""
        try:
            return gguf_names.from_hf(name, self._arch) in self._tensors
        except KeyError:
            return False

    def kv_scales(self, prefix: str, num_kv_heads: int) -> Tensor | None:
        return None

    def unread(self) -> set[str]:
        return set(self._unused)

    def finish(self, read: Collection[str] = ()) -> None:
        self._file.release_pages()
        check_unused(self._unused.difference(read), lambda _: Path(self._file.path))

    def _unfolding(self, name: str, shape: tuple[int, int]) -> Tensor | None:
        """A latent's keys and values, [H * (Dn + Dv), L], of a file that has them apart.

        None for any other tensor. The keys' are transposed, [H, L, Dn].
        """
        gguf_name = gguf_names.from_hf(name, self._arch)
        keys = gguf_name.replace(".attn_kv_b.", ".attn_k_b.")
        if gguf_name in self._tensors or keys == gguf_name or keys not in self._tensors:
            return None
        values = gguf_name.replace(".attn_kv_b.", ".attn_v_b.")
        heads, rank, key_dim = self._tensors[keys][0]
        value_dim = shape[0] // heads - key_dim
        parts = []
        for found, sizes in ((keys, (heads, rank, key_dim)), (values, (heads, value_dim, rank))):
            _, kind, nbytes = self._take_named(found, sizes)
            parts.append(self._floats(found, kind, sizes, None, self._dtype, nbytes))
        return torch.cat([parts[0].transpose(1, 2), parts[1]], 1).reshape(shape)

    def _half(self, name: str, shape: tuple[int, int], part: Part) -> tuple[str, int, Part]:
        """(tensor, its rows, part) of experts' gates or ups, which files may stack."""
        gguf_name = gguf_names.from_hf(name, self._arch)
        fused = re.sub("ffn_(gate|up)_exps", "ffn_gate_up_exps", gguf_name)
        if gguf_name in self._tensors or fused not in self._tensors:
            return gguf_name, shape[0], part
        ranges = part.ranges if isinstance(part, Rows) else ((0, shape[0]),)
        offset = 0 if "_gate_exps" in gguf_name else shape[0]
        moved = Rows(tuple((begin + offset, end + offset) for begin, end in ranges))
        return fused, 2 * shape[0], moved

    def _take(self, name: str, shape: tuple[int, ...]) -> tuple[str, str, int]:
        return self._take_named(gguf_names.from_hf(name, self._arch), shape)

    def _take_named(self, gguf_name: str, shape: tuple[int, ...]) -> tuple[str, str, int]:
        if gguf_name not in self._tensors:
            raise ModelLoadError(f"{self._file.path}: tensor {gguf_name} is missing")
        found, kind, _offset, nbytes = self._tensors[gguf_name]
        # Files leave out sizes of one: of a single row, of a convolution's channel. A vector of
        # several groups or heads may be a matrix.
        is_vector = len(shape) == 1 and math.prod(found) == shape[0]
        sizes, want = ([size for size in each if size != 1] for each in (found, shape))
        if sizes != want and not is_vector:
            check_shape(self._file.path, gguf_name, found, shape)
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
        if self._tiled is not None:
            gguf_name = gguf_names.from_hf(name, self._arch)
            module = gguf_name.split(".")[2] if gguf_name.startswith("blk.") else ""
            return self._tiled.rows(module, num_rows)
        num_heads = self._heads.get(name.split(".")[-2])
        return None if num_heads is None else gguf_names.deinterleaved_rows(num_rows, num_heads)

    def _bytes(self, gguf_name: str) -> Tensor:
        with warnings.catch_warnings():
            # torch has no read-only tensors and warns; nothing writes to these.
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
            dtype = DENSE_DTYPES.get(kind, self._unpacked if kind in GRIDS else self.act_dtype)
        out = torch.empty(math.prod(shape), dtype=torch.float32)
        self._file.dequantize(gguf_name, out.numpy())
        out = out.view(shape)
        if order is not None:
            out = out[order]
        self._progress(nbytes)
        return out.to(device=self._device, dtype=dtype)
