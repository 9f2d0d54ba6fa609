"""StepContext: one step's tokens, and where attention finds their keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.recurrent import Steps
from octavo.kernels.shared_prefixes import SharedPrefixes


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
    # Which requests begin with the same blocks: of a step of decodes alone, and of an op set whose
    # attention takes it.
    shared: SharedPrefixes | None = None
    # The same tokens for layers that attend in chunks, as ``in_chunks`` makes it.
    chunks: StepContext | None = None

    @property
    def steps(self) -> Steps:
        """The step's requests, as ops of layers with a state take them."""
        return Steps(
            self.slots, self.seq_lens, self.query_start_loc, self.num_decodes, self.max_query_len
        )

    def in_chunks(self, size: int, block_size: int) -> StepContext:
        """The same tokens, with each chunk of a request's ``size`` tokens as a request by itself.

        A query then sees its own chunk alone. What a chunk's request has in its row of the block
        table are the chunk's blocks, and ``size`` is a multiple of ``block_size``. No value is read
        on the host: a prefill has as many chunks as ``max_query_len`` may touch, some empty.
        Positions and slot mapping stay those of the whole requests.
        """
        most = (self.max_query_len + size - 2) // size + 1
        num_reqs, device = len(self.slots), self.slots.device
        decodes = torch.arange(self.num_decodes, device=device)
        prefills = torch.arange(self.num_decodes, num_reqs, device=device)
        owner = torch.cat((decodes, prefills.repeat_interleave(most)))
        piece = torch.cat(
            (torch.zeros_like(decodes), torch.arange(most, device=device).repeat(len(prefills)))
        )
        starts = self.query_start_loc
        query_lens = starts[1:] - starts[:-1]
        first = (self.seq_lens - query_lens).clamp(min=0)[owner]
        low = (first // size + piece) * size
        rows = starts[:-1][owner] + (low - first).clamp(min=0).minimum(query_lens[owner])
        query_start_loc = torch.cat((rows, starts[-1:])).int()
        seq_lens = (self.seq_lens[owner] - low).clamp(0, size)
        seq_lens = torch.where(query_start_loc[1:] > query_start_loc[:-1], seq_lens, 0)
        width = self.block_table.shape[1]
        columns = torch.arange(min(size // block_size, width), device=device)
        columns = ((low // block_size)[:, None] + columns).clamp(max=width - 1)
        return replace(
            self,
            slots=torch.arange(len(owner), dtype=torch.int32, device=device),
            seq_lens=seq_lens.int(),
            query_start_loc=query_start_loc,
            block_table=self.block_table[self.slots.long()[owner][:, None], columns],
            num_reqs=len(owner),
            max_query_len=min(self.max_query_len, size),
            max_seq_len=min(self.max_seq_len, size),
            shared=None,
        )


class LayerState(NamedTuple):
    """One layer's states, a row per slot and checkpoint.

    ``conv``: [rows, channels, width - 1], in the activations' dtype. ``recurrent``: float32
    [rows, heads, ...], None where a layer has a convolution alone.
    """

    conv: Tensor
    recurrent: Tensor | None
