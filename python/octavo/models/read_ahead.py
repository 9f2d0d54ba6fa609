"""ReadAhead: threads that read checkpoint files into the page cache before they are asked for.

A copy from a mapped file to a GPU waits for the disk, then the disk waits for the copy, and a
page that is missed costs a small read. So the files are read in their order, in large blocks, and
who wants a tensor waits until the readers have passed it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

# As large as disks like to be asked, as small as lets the readers share the file at hand.
BLOCK_BYTES = 8 << 20
# One is enough for a disk of 1.8 GB/s, which gives two to eight no more; the copy out of the page
# cache bounds one thread to a few GB/s.
NUM_THREADS = 2
# Of the memory that is free: what is read ahead must still be there when it is needed.
MEMORY_FRACTION = 0.5


class ReadAhead:
    """Reads ``files`` in order, at most ``max_ahead`` bytes past the last that was waited for.

    A context manager: its threads end with it, read to the end or not. What cannot be read is
    left to whoever needs it, who can say why.
    """

    def __init__(
        self, files: Sequence[Path], max_ahead: int, num_threads: int = NUM_THREADS
    ) -> None:
        self._blocks: list[tuple[Path, int]] = []
        self._first_block: dict[Path, int] = {}
        for file in files:
            self._first_block[file] = len(self._blocks)
            size = file.stat().st_size
            self._blocks += [(file, offset) for offset in range(0, size, BLOCK_BYTES)]
        self._blocks_ahead = max(max_ahead // BLOCK_BYTES, 1)
        self._moved = threading.Condition()
        self._is_read = [False] * len(self._blocks)
        self._next = 0
        self._num_read = 0  # blocks, without a gap before them
        self._wanted = 0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name="octavo-read-ahead", daemon=True)
            for _ in range(num_threads)
        ]

    def wait(self, file: Path, end: int) -> None:
        """Until the first ``end`` bytes of a file, and what comes before it, have been read."""
        block = min(self._first_block[file] + -(-end // BLOCK_BYTES), len(self._blocks))
        with self._moved:
            self._wanted = max(self._wanted, block)
            self._moved.notify_all()
            while self._num_read < block and not self._stopping:
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
        with self._moved:
            self._stopping = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        buffer = bytearray(BLOCK_BYTES)
        while (block := self._next_block()) is not None:
            file, offset = self._blocks[block]
            try:
                with file.open("rb", buffering=0) as stream:
                    stream.seek(offset)
                    stream.readinto(buffer)
            except OSError:
                pass  # whoever needs it will fail as well, and say why
            with self._moved:
                self._is_read[block] = True
                while self._num_read < len(self._blocks) and self._is_read[self._num_read]:
                    self._num_read += 1
                self._moved.notify_all()

    def _next_block(self) -> int | None:
        with self._moved:
            while not self._stopping and self._next >= self._wanted + self._blocks_ahead:
                self._moved.wait()
            if self._stopping or self._next == len(self._blocks):
                return None
            self._next += 1
            return self._next - 1
