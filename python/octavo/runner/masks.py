"""Masks: which tokens may come next in the constrained rows of a step, on a host or a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.cpu.logits import mask_logits_

# Fills two buffers: int32 [max_num_seqs], the row among the step's samples that each mask is of, -1
# where any token may come; uint32 [max_num_seqs, ceil(V / 32)], the masks. Returns their number.
FillMasks: TypeAlias = Callable[[NDArray[np.int32], NDArray[np.uint32]], int]


def empty_masks(max_num_seqs: int, vocab_size: int) -> Masks:
    """Room for one mask per request."""
    words = np.empty((max_num_seqs, -(-vocab_size // 32)), np.uint32)
    return Masks(np.empty(max_num_seqs, np.int32), words)


class Masks(NamedTuple):
    """Masks on the host.

    ``rows`` [M], ``words`` [M, ceil(V / 32)]: as FillMasks fills them.
    """

    rows: NDArray[np.int32]
    words: NDArray[np.uint32]

    def filled(self, fill: FillMasks) -> Masks:
        """A step's masks, in this room."""
        num_masks = fill(self.rows, self.words)
        return Masks(self.rows[:num_masks], self.words[:num_masks])

    def apply(self, logits: NDArray[np.float32]) -> list[int]:
        """Make the logits [S, V], contiguous, of tokens that may not come -inf, in place.

        Returns:
            the rows in which none is left.
        """
        words = torch.from_numpy(self.words.view(np.int32))
        has_any = mask_logits_(torch.from_numpy(logits), torch.from_numpy(self.rows), words)
        rows: list[int] = self.rows[~has_any.numpy()].tolist()
        return rows


class RowMasks:
    """A step's masks in one buffer, which one copy brings from the host to a device.

    Args:
        max_rows: of logits, padding included.
        pinned: whether it is the host's, for such copies.
    """

    def __init__(
        self,
        max_rows: int,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        *,
        pinned: bool = False,
    ) -> None:
        self.num_words = -(-vocab_size // 32)
        length = max_rows + max_num_seqs * self.num_words
        # int32: ``index``, then ``words``.
        self.packed: Tensor = torch.zeros(
            length, dtype=torch.int32, device=device, pin_memory=pinned
        )
        # [max_rows]: the mask of each row of logits; -1: it has none.
        self.index = self.packed[:max_rows]
        # [max_num_seqs, num_words]: a bit a token.
        self.words = self.packed[max_rows:].view(max_num_seqs, self.num_words)
        self.address = self.packed.data_ptr()
        if device.type == "cpu":
            self._host_index = self.index.numpy()
            self._host_rows = np.empty(max_num_seqs, np.int32)
            self._host_words = self.words.numpy().view(np.uint32)

    def fill(self, fill: FillMasks) -> int:
        """Take a step's masks, on the host. Returns how many elements of ``packed`` hold them."""
        num_masks = fill(self._host_rows, self._host_words)
        rows = self._host_rows[:num_masks]
        used = np.flatnonzero(rows >= 0)
        self._host_index.fill(-1)
        self._host_index[rows[used]] = used
        return len(self._host_index) + num_masks * self.num_words

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [S, V] with -inf where a row's mask has no bit: a copy, on this device."""
        index = self.index[: len(logits)]
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        words = self.words[index.clamp_min(0)]
        allowed = ((words[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]].bool()
        return logits.masked_fill(~allowed & (index >= 0)[:, None], float("-inf"))
