"""StepContext: one step's tokens, and where attention finds their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from octavo.kernels.recurrent import Steps


@dataclass(slots=True, eq=False)
class StepContext:
    """One step's tokens and where their keys and values live. All tensors int32, on the device.

    Requests come decodes first (one query token each), then prefill chunks; request r's tokens are
    rows query_start_loc[r] : query_start_loc[r + 1], and the last of them is at position
    seq_lens[r] - 1.
    """

    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]  block_id * block_size + offset, or -1: nothing is stored
    slots: Tensor  # [R]  row of block_table
    seq_lens: Tensor  # [R]  tokens in the cache, this step's included
    query_start_loc: Tensor  # [R + 1]
    block_table: Tensor  # [max_num_seqs + 1, max_blocks_per_seq]
    num_reqs: int
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    # Only each request's last row of the result is read: an op set may skip the others in its last
    # layer.
    ends_only: bool = False

    @property
    def steps(self) -> Steps:
        """The step's requests, as ops of layers with a state take them."""
        return Steps(
            self.slots, self.seq_lens, self.query_start_loc, self.num_decodes, self.max_query_len
        )


class LayerState(NamedTuple):
    """One layer's states, a row per slot and checkpoint.

    ``conv``: [rows, channels, width - 1], in the activations' dtype. ``recurrent``: float32
    [rows, heads, ...], None where a layer has a convolution alone.
    """

    conv: Tensor
    recurrent: Tensor | None
