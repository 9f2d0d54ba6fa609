"""ReadAhead: threads that prefetch a checkpoint's tensors onto a GPU.

Each reads a block into page-locked memory and copies it to wherever on the device its bytes belong,
so that the disk never waits for a copy, nor the last tensor for its own. Several readers, each in a
large region of its own, read more than one: small regions, or readers that take turns, break up the
system's own read-ahead, and O_DIRECT is slower than the page cache (``bench/load.py``;
bench/NOTES.md, "Four readers").

Of tensors that several devices share, each has its part alone. There the readers bring the files
into the system's page cache once for all, and every shard copies its part out of its map of them.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from octavo.checkpoints.safetensors import TENSOR_KINDS, TensorEntry, read_entries
from octavo.errors import ModelLoadError

NUM_READERS = 4
REGION_BYTES = 256 << 20
# One read and one copy: large enough that the calls cost nothing, small enough that the disk
# hardly waits for the last copy, and that page-locked memory is no matter.
BLOCK_BYTES = 8 << 20
# Past the last tensor that was asked for, on the device: every reader may be two regions ahead.
MAX_AHEAD_BYTES = 2 * NUM_READERS * REGION_BYTES


class _Tensor:
    """One tensor in transfer: its place in the file, and on the device once allocated."""

    __slots__ = ("data", "entry", "num_missing")

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        self.data: Tensor | None = None
        self.num_missing = entry.end - entry.begin


@dataclass(frozen=True, slots=True)
class _Region:
    """Bytes [begin, end) of a file, whose first byte is number ``start`` of all files'."""

    file: Path
    begin: int
    end: int
    start: int


class ReadAhead:
    """Reads the tensors of safetensors ``files`` in order: those that ``is_wanted`` by their names.

    ``device``: where they go; None leaves them to the page cache. At most ``max_ahead`` bytes past
    the last that was asked for; None is what the device has room for beside the tensors. A context
    manager: its threads end with it, read to the end or not.

    Raises:
        ModelLoadError: a file is cut short, or of another kind.
    """

    def __init__(
        self,
        files: Sequence[Path],
        device: torch.device | None,
        max_ahead: int | None = None,
        is_wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._device = device
        on_gpu = device is not None and device.type == "cuda"
        # Threads begin on the default stream; memory that a model frees is used again in the
        # order of the stream it was allocated on.
        self._stream = torch.cuda.current_stream(device) if on_gpu else None
        self._starts: dict[Path, int] = {}  # of each file, in all files end to end
        self._tensors: dict[Path, list[_Tensor]] = {}  # as they lie in their files
        self._by_name: dict[tuple[Path, str], _Tensor] = {}
        self._regions: list[_Region] = []
        total = 0
        for file in files:
            tensors = [_Tensor(e) for e in read_entries(file) if is_wanted(e.name)]
            self._starts[file] = total
            self._tensors[file] = [tensor for tensor in tensors if tensor.num_missing]
            self._by_name.update(((file, tensor.entry.name), tensor) for tensor in tensors)
            if not tensors:
                continue
            size = tensors[-1].entry.end
            for begin in range(tensors[0].entry.begin, size, REGION_BYTES):
                end = min(begin + REGION_BYTES, size)
                if self._overlapping(file, begin, end):
                    self._regions.append(_Region(file, begin, end, total + begin))
            total += size
        if max_ahead is None:
            wanted = sum(tensor.num_missing for tensor in self._by_name.values())
            max_ahead = _room(device, wanted)
        self._max_ahead = max_ahead
        self._moved = threading.Condition()
        self._next = 0  # the first region that no reader has taken
        self._wanted = 0
        self._ended = False
        self._error: Exception | None = None
        self.num_bytes = 0  # that have been read, wherever they are
        self._threads = [
            threading.Thread(target=self._run, name="octavo-read-ahead", daemon=True)
            for _ in range(min(NUM_READERS, len(self._regions)))
        ]

    def take(self, file: Path, name: str) -> Tensor | None:
        """A tensor on the device, once it is there; it is handed out once.

        None, as often as it is asked for, once the page cache has it, where there is no device.

        Raises:
            ModelLoadError: its file, or what comes before it, could not be read; names which.
        """
        with self._moved:
            tensor = self._by_name[file, name]
            if self._device is not None:
                del self._by_name[file, name]
            self._wanted = max(self._wanted, self._starts[file] + tensor.entry.end)
            self._moved.notify_all()
            while tensor.num_missing and not self._ended:
                self._moved.wait()
            if tensor.num_missing:
                raise self._error or RuntimeError("reading has ended")
            if self._device is None:
                return None
            data, tensor.data = self._place(tensor), None
        return data

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(None)
        for thread in self._threads:
            thread.join()
        self._tensors.clear()
        self._by_name.clear()
        if self._stream is not None:
            # What parts of fused matrices took is the KV cache's now.
            torch.cuda.empty_cache()

    def _place(self, tensor: _Tensor) -> Tensor:
        """A tensor's memory on the device. Under the lock: two readers may meet in one tensor."""
        if tensor.data is None:
            entry = tensor.entry
            tensor.data = torch.empty(
                entry.shape, dtype=TENSOR_KINDS[entry.dtype], device=self._device
            )
        return tensor.data

    def _run(self) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                buffer = torch.empty(
                    BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None
                )
                while (region := self._take_region()) is not None:
                    self._read(region, buffer)
        except Exception as error:
            self._end(error)  # take raises it

    def _take_region(self) -> _Region | None:
        with self._moved:
            if self._next == len(self._regions):
                return None
            self._next += 1
            return self._regions[self._next - 1]

    def _read(self, region: _Region, buffer: Tensor) -> None:
        view = buffer.numpy().data
        at = region.begin
        try:
            with region.file.open("rb", buffering=0) as stream:
                stream.seek(at)
                while at < region.end and self._may_read(region.start + at - region.begin):
                    num_bytes = stream.readinto(view[: region.end - at])
                    if not num_bytes:
                        raise OSError("the file has become shorter")
                    self._copy(region.file, at, buffer[:num_bytes])
                    at += num_bytes
        except OSError as error:
            name = self._overlapping(region.file, at, at + 1)[0].entry.name
            raise ModelLoadError(f"{region.file}: tensor {name}: {error}") from error

    def _may_read(self, at: int) -> bool:
        """Wait until byte ``at`` of all files is within bounds; False at the end."""
        with self._moved:
            while not self._ended and at >= self._wanted + self._max_ahead:
                self._moved.wait()
            return not self._ended

    def _copy(self, file: Path, at: int, block: Tensor) -> None:
        """Copy a file's bytes from ``at`` on to all the tensors they belong to."""
        end = at + len(block)
        filled: list[tuple[_Tensor, int]] = []
        for tensor in self._overlapping(file, at, end):
            entry = tensor.entry
            if entry.dtype not in TENSOR_KINDS:
                continue  # of a dtype that is not read
            first, last = max(at, entry.begin), min(end, entry.end)
            if self._device is not None:
                with self._moved:
                    data = self._place(tensor)
                target = data.view(-1).view(torch.uint8)[first - entry.begin : last - entry.begin]
                target.copy_(block[first - at : last - at], non_blocking=True)
            filled.append((tensor, last - first))
        if self._stream is not None:
            self._stream.synchronize()  # the block is written to again
        with self._moved:
            for tensor, num_bytes in filled:
                tensor.num_missing -= num_bytes
            self.num_bytes += len(block)
            self._moved.notify_all()

    def _overlapping(self, file: Path, begin: int, end: int) -> list[_Tensor]:
        tensors = self._tensors[file]
        first = bisect.bisect_right(tensors, begin, key=lambda tensor: tensor.entry.end)
        last = bisect.bisect_left(tensors, end, key=lambda tensor: tensor.entry.begin)
        return tensors[first:last]

    def _end(self, error: Exception | None) -> None:
        with self._moved:
            self._ended = True
            self._error = self._error or error
            self._moved.notify_all()


def _room(device: torch.device | None, num_bytes: int) -> int:
    """Bytes that may wait on the device: half of those that ``num_bytes`` of weights leave free."""
    if device is None or device.type != "cuda":
        return MAX_AHEAD_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return max(0, min(MAX_AHEAD_BYTES, (free - num_bytes) // 2))
