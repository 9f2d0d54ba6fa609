"""SlotRecords: each request's record in the slot table, as the host writes it at admission.

``octavo.kernels.slots`` names the columns. The CPU's sampler computes from these rows; a GPU gets a
row with the step's plan when its request is given the slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.kernels.slots import (
    COLUMNS,
    NUM_PROMPT_TOKENS,
    PARAMETERS,
    RECORD_LEN,
    SEED_HIGH,
    SEED_LOW,
    SLOT,
    TEMPERATURE,
    Column,
)
from octavo.runner.request_state import RequestState

_MASK32 = (1 << 32) - 1
_MAX_INT32 = (1 << 31) - 1


class SlotRecords:
    """int32 [N, RECORD_LEN], a record per slot; neutral until one is written."""

    def __init__(self, num_slots: int) -> None:
        self.rows = np.zeros((num_slots, RECORD_LEN), np.int32)
        self._floats = self.rows.view(np.float32)
        self._bits = self.rows.view(np.uint32)
        for column in COLUMNS:
            column_of(self.rows, column)[:] = column.neutral

    def write(self, slot: int, state: RequestState) -> NDArray[np.int32]:
        """Write the record of a request whose seed is set; returns the row, a view."""
        assert state.seed is not None
        row: NDArray[np.int32] = self.rows[slot]
        floats, bits = self._floats[slot], self._bits[slot]
        row[SLOT.index] = slot
        row[NUM_PROMPT_TOKENS.index] = state.num_prompt_tokens
        bits[SEED_LOW.index] = state.seed & _MASK32
        bits[SEED_HIGH.index] = state.seed >> 32 & _MASK32
        for column in PARAMETERS:
            value = getattr(state.params, column.name)
            if column.is_float:
                floats[column.index] = value
            else:
                row[column.index] = min(value, _MAX_INT32)
        if state.params.greedy:
            floats[TEMPERATURE.index] = 0.0
        return row


def column_of(rows: NDArray[np.int32], column: Column) -> NDArray[Any]:
    """A column [R] of records [R, RECORD_LEN], in the column's type: int32 or float32."""
    typed: NDArray[Any] = rows.view(np.float32) if column.is_float else rows
    return typed[:, column.index]


def seeds_of(rows: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The seeds [R] of records [R, RECORD_LEN]."""
    bits = rows.view(np.uint32).astype(np.uint64)
    seeds: NDArray[np.uint64] = bits[:, SEED_HIGH.index] << np.uint64(32) | bits[:, SEED_LOW.index]
    return seeds
