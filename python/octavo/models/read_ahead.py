"""ReadAhead: threads that read checkpoint files into the page cache before they are asked for.

A copy from a mapped file to a GPU waits for the disk, then the disk waits for the copy, and a
page that is missed costs a small read. So the files are read from end to end, and who wants a
tensor waits until all before it has been read. Several readers, each in a region of its own: on a
virtual disk four of them read 1.81 GB/s where one reads 1.63; regions of 64 MB, or readers that
take turns, break up what the system reads ahead of each, and past the page cache (O_DIRECT) even
sixteen read no more than 1.2.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NUM_READERS = 4
REGION_BYTES = 256 << 20
# One read: large enough that the calls cost nothing, small enough that nobody waits long.
BLOCK_BYTES = 8 << 20
# Of the memory that is free: what is read ahead must still be there when it is needed.
MEMORY_FRACTION = 0.5


class _Region:
    """Bytes [offset, offset + size) of a file, the first ``num_read`` of them read; they begin at
    ``start`` where all files are one behind the other."""

    __slots__ = ("file", "num_read", "offset", "size", "start")

    def __init__(self, file: Path, offset: int, size: int, start: int) -> None:
        self.file, self.offset, self.size, self.start = file, offset, size, start
        self.num_read = 0


class ReadAhead:
    """Reads ``files`` in order, at most ``max_ahead`` bytes past the last that was waited for.

    A context manager: its threads end with it, read to the end or not. What cannot be read is
    left to whoever needs it, who can say why.
    """

    def __init__(self, files: Sequence[Path], max_ahead: int) -> None:
        self._starts: dict[Path, int] = {}  # of each file, where all are one behind the other
        self._regions: list[_Region] = []
        total = 0
        for file in files:
            self._starts[file] = total
            size = file.stat().st_size
            for offset in range(0, size, REGION_BYTES):
                length = min(REGION_BYTES, size - offset)
                self._regions.append(_Region(file, offset, length, total + offset))
            total += size
        self._num_bytes = total
        self._max_ahead = max(max_ahead, BLOCK_BYTES)
        self._moved = threading.Condition()
        self._next = 0  # the first region that no reader has taken
        self._first = 0  # the first region that is not read
        self._wanted = 0
        self._ended = not self._regions
        self._threads = [
            threading.Thread(target=self._run, name="octavo-read-ahead", daemon=True)
            for _ in range(min(NUM_READERS, len(self._regions)))
        ]

    @property
    def num_bytes(self) -> int:
        """How many bytes have been read, wherever they are."""
        return sum(region.num_read for region in self._regions)

    def wait(self, file: Path, end: int) -> None:
        """Until the first ``end`` bytes of a file, and what comes before it, have been read."""
        wanted = self._starts[file] + end
        with self._moved:
            self._wanted = max(self._wanted, wanted)
            self._moved.notify_all()
            while self._num_behind() < wanted and not self._ended:
                self._moved.wait()

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
        self._end()
        for thread in self._threads:
            thread.join()

    def _num_behind(self) -> int:
        """How many bytes have been read without a gap."""
        while self._first < len(self._regions):
            region = self._regions[self._first]
            if region.num_read < region.size:
                return region.start + region.num_read
            self._first += 1
        return self._num_bytes

    def _run(self) -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        try:
            while (region := self._take()) is not None:
                self._read(region, buffer)
        except OSError:
            self._end()  # whoever needs it will fail as well, and say why

    def _take(self) -> _Region | None:
        with self._moved:
            if self._next == len(self._regions):
                return None
            self._next += 1
            return self._regions[self._next - 1]

    def _read(self, region: _Region, buffer: memoryview) -> None:
        with region.file.open("rb", buffering=0) as stream:
            stream.seek(region.offset)
            while region.num_read < region.size and self._may_read(region):
                num_bytes = stream.readinto(buffer[: region.size - region.num_read])
                if not num_bytes:
                    raise OSError(f"{region.file} has become shorter")
                with self._moved:
                    region.num_read += num_bytes
                    self._moved.notify_all()

    def _may_read(self, region: _Region) -> bool:
        """Waits until the region's next block is within bounds; False at the end."""
        with self._moved:
            at = region.start + region.num_read
            while not self._ended and at >= self._wanted + self._max_ahead:
                self._moved.wait()
            return not self._ended

    def _end(self) -> None:
        with self._moved:
            self._ended = True
            self._moved.notify_all()
