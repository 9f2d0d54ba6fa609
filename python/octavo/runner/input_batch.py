"""InputBatch: one step's staged arrays as tensors, and the block table they index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from octavo.layers.context import StepContext

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch


class InputBatch:
    """The step on the device. Tensors are views of one buffer, int32; see Staging for layouts.

    The block table is [max_num_seqs + 1, max_blocks_per_seq]; its last row is the padding's.
    """

    __slots__ = (
        "block_table",
        "context",
        "input_ids",
        "sample_rows",
        "sample_slots",
    )

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int, device: torch.device) -> None:
        self.block_table = torch.zeros(
            max_num_seqs + 1, max_blocks_per_seq, dtype=torch.int32, device=device
        )
        self.input_ids: Tensor
        self.sample_rows: Tensor
        self.sample_slots: Tensor
        self.context: StepContext

    def load(self, batch: ScheduledBatch, packed: Tensor) -> None:
        """Take a step: ``packed``, int32 [packed_len], is its staged buffer on the device."""
        tokens, reqs = batch.num_tokens, batch.num_reqs
        # Sections follow one another without gaps: one call makes every view.
        (
            self.input_ids,
            positions,
            slot_mapping,
            slots,
            seq_lens,
            query_start_loc,
            self.sample_rows,
            self.sample_slots,
            updates,
        ) = packed[: batch.state_restores_offset].split_with_sizes(
            [
                tokens,
                tokens,
                tokens,
                reqs,
                reqs,
                reqs + 1,
                reqs,
                reqs,
                2 * batch.num_block_updates,
            ]
        )
        if batch.num_block_updates:
            self._update_blocks(updates, batch.num_block_updates)
        self.context = StepContext(
            positions=positions,
            slot_mapping=slot_mapping,
            slots=slots,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            block_table=self.block_table,
            num_reqs=batch.num_reqs,
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
        )

    def _update_blocks(self, updates: Tensor, num: int) -> None:
        if updates.device.type == "cpu":
            # numpy's scatter starts ten times faster than torch's.
            table: np.ndarray[tuple[int, ...], np.dtype[np.int32]] = self.block_table.numpy()
            pairs = updates.numpy()
            table.reshape(-1)[pairs[:num]] = pairs[num:]
        else:
            self.block_table.view(-1)[updates[:num].long()] = updates[num:]
