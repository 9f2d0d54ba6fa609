"""Deadline: a bound on how long a peer may hold a connection by doing nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls back when a time has passed, unless it was put off or lifted by then.

    One timer, which checks the clock when it rings: setting and cancelling one for each request
    of a connection would cost as much as its head does.

    Args:
        loop: whose clock it is.
        on_expiry: called on the loop; the deadline is lifted then.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expiry: Callable[[], None]) -> None:
        self._loop = loop
        self._on_expiry = on_expiry
        self._due_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Let it expire so many seconds from now."""
        self._due_s = self._loop.time() + seconds
        timer = self._timer
        if timer is not None:
            if timer.when() <= self._due_s:
                return
            timer.cancel()
        self._timer = self._loop.call_at(self._due_s, self._ring)

    def lift(self) -> None:
        """Let it not expire."""
        self._due_s = None

    def close(self) -> None:
        """Lift it for good. Else its timer would hold all of a lost connection."""
        self._due_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self._due_s is None:
            return
        if self._due_s > self._loop.time():
            self._timer = self._loop.call_at(self._due_s, self._ring)
            return
        self._due_s = None
        self._on_expiry()
