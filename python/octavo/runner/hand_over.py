"""HandOver: a rank's states on their way from one stage of a pipeline to the next.

The sender's stream copies them into one of several inboxes on the receiver's device, so that it
goes on with its next step at once; the receiver's stream waits for that, and takes them from there
to the one place that its graphs read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.runner.cuda_driver import CudaDriver, make_event


class HandOver:
    """The way of one rank's states.

    Args:
        device: the receiver's.
        stream: the sender's; None is Triton's interpreter.
        shape: rows of the largest step, and elements of a row.
        num_turns: steps that may be launched and not collected, and one.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        num_turns: int,
    ) -> None:
        # A step's inbox is free: the step that had it last has been collected.
        self._inboxes = torch.zeros((num_turns, *shape), dtype=dtype, device=device)
        self.states = torch.zeros(shape, dtype=dtype, device=device)
        self._row_bytes = shape[1] * dtype.itemsize
        self._addresses = [inbox.data_ptr() for inbox in self._inboxes]
        self._address = self.states.data_ptr()
        self._sent = [] if stream is None else [make_event(stream) for _ in range(num_turns)]
        self._handles = [event.cuda_event for event in self._sent]

    def send(self, states: Tensor, rows: int, turn: int, driver: CudaDriver | None) -> None:
        """Queue the copy of states [rows or more, D] on the sender's stream: ``driver``'s."""
        if driver is None:
            self._inboxes[turn, :rows] = states[:rows]
            return
        driver.send(
            (self._addresses[turn], states.data_ptr(), rows * self._row_bytes), self._handles[turn]
        )

    def receive(self, rows: int, turn: int, driver: CudaDriver | None) -> None:
        """Have the receiver's stream wait for what was sent, and make it ``states``."""
        if driver is None:
            self.states[:rows] = self._inboxes[turn, :rows]
            return
        driver.receive(
            (self._address, self._addresses[turn], rows * self._row_bytes), self._handles[turn]
        )
