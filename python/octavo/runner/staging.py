"""StagingBuffer: memory in which the core writes a step's plan."""

from __future__ import annotations

import numpy as np
import torch

from octavo._core import Staging


class StagingBuffer:
    """A Staging and the memory the core writes, int32, pinned where a GPU reads it.

    ``host`` is all of it, at ``address``; ``header`` the first ``header_len`` elements as bytes,
    ``array`` the core's rest.
    """

    __slots__ = ("address", "array", "header", "host", "staging")

    def __init__(self, length: int, *, pinned: bool, header_len: int = 0) -> None:
        self.host = torch.zeros(header_len + length, dtype=torch.int32, pin_memory=pinned)
        self.address = self.host.data_ptr()
        self.header = self.host.numpy()[:header_len].view(np.uint8).data
        self.array = self.host.numpy()[header_len:]
        self.staging = Staging(self.array)
