"""Per-slot state on the device: a column of the slot table in a kernel, and what sampling reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import slots as columns

RECORD_LEN = tl.constexpr(columns.RECORD_LEN)


@triton.jit
def column_at(slot_table, slot, COLUMN: tl.constexpr):
    """Pointer to a column of the record of ``slot``, a scalar or a tile."""
    return slot_table + slot * RECORD_LEN + COLUMN.value.index


@triton.jit
def load_column(slot_table, slot, COLUMN: tl.constexpr):
    """A column of the record of ``slot``, in the column's type."""
    bits = tl.load(column_at(slot_table, slot, COLUMN))
    if COLUMN.value.is_float:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits


@dataclass(frozen=True)
class SamplingState:
    """Tensors that ``sample`` reads and advances, by slot; N slots, vocabulary V, one device.

    A None tensor switches its feature off for the whole graph; a neutral value for one slot.
    """

    # [N, RECORD_LEN] int32: sample() writes LAST_TOKEN and adds 1 to OUTPUT_POSITION.
    slot_table: torch.Tensor
    # [N, V] int16: generated so far, | IN_PROMPT; with it the penalties apply.
    token_counts: torch.Tensor | None = None
    # Added to logits while OUTPUT_POSITION < bias_until (-inf until min_tokens bans a stop token).
    bias_ids: torch.Tensor | None = None  # [N, B] int32, distinct; -1: none
    bias_values: torch.Tensor | None = None  # [N, B] float32
    bias_until: torch.Tensor | None = None  # [N, B] int32
    allowed_mask: torch.Tensor | None = None  # [N, ceil(V / 32)] int32, a bit a token


class TokenMasks(NamedTuple):
    """The tokens that may come next in some rows of a step, a bit a token: token i is bit i % 32 of
    word i // 32."""

    of_row: torch.Tensor  # [>= S] int32: the mask of each row of logits; below 0: it has none
    words: torch.Tensor  # [M, ceil(V / 32)] int32


class HostIds(NamedTuple):
    """Host memory for a step's ids, written by the kernel that chooses them.

    A copy of its own would be one more call of the driver for the host, and one more wait for the
    device. Several steps' ids may be on their way, so each has a row.
    """

    ids: torch.Tensor  # [T, >= S] int32, pinned
    turn: torch.Tensor  # [1] int32 on the device: the row of this step
