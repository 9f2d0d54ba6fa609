"""Terminal: standard output and error that can neither fail nor hold up whoever writes to them."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import sys
import threading
from typing import Final, TextIO

# Lines that wait for a reader; more are dropped.
MAX_WAITING: Final = 10_000
# How long the end of a process waits for its last lines to be read.
DRAIN_S: Final = 1.0


class _Stream(io.TextIOBase):
    """A text stream that hands what is written to a thread."""

    def __init__(self, terminal: Terminal, stream: TextIO) -> None:
        self.terminal = terminal
        self._fd = stream.fileno()
        self._is_tty = stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return self._is_tty

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.terminal.put(self._fd, text.encode("utf-8", "backslashreplace"))
        return len(text)


class Terminal:
    """While it is entered, ``sys.stdout`` and ``sys.stderr`` lose text rather than raise or wait.

    A pipe whose reader is gone, a full disk, a closed window: none of them is a reason for a server
    to fail, and a pipe that nobody reads is none to stand still. A thread does the writing. Streams
    without a file, such as a test's, stay as they are.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[int, bytes]] = queue.Queue(MAX_WAITING)
        self._replaced: list[tuple[str, TextIO]] = []

    def __enter__(self) -> Terminal:
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            with contextlib.suppress(OSError, ValueError, AttributeError):
                replacement = _Stream(self, stream)  # type: ignore[arg-type]
                self._replaced.append((name, stream))  # type: ignore[arg-type]
                setattr(sys, name, replacement)
        # A daemon: it may be in the middle of a write that never ends.
        threading.Thread(target=self._run, name="octavo-terminal", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.drain()
        for name, stream in self._replaced:
            setattr(sys, name, stream)

    def put(self, fd: int, data: bytes) -> None:
        """Write this some time; never waits."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((fd, data))

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Wait until all is written, though not for long."""
        done = threading.Event()
        threading.Thread(target=self._join, args=(done,), daemon=True).start()
        done.wait(timeout_s)

    def _join(self, done: threading.Event) -> None:
        self._waiting.join()
        done.set()

    def _run(self) -> None:
        while True:
            fd, data = self._waiting.get()
            # What cannot be written is lost: there is nowhere to tell it.
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(fd, data) :]
            self._waiting.task_done()


def drain() -> None:
    """Wait until what a Terminal took is written, though not for long: for exits past its end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.terminal.drain()
            return
