"""streamed: the tiles of gemv_streamed, by chip and shape, and how its programs share the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch import cdiv, next_power_of_2, num_sms
from .limits import capability, chip_name, shared_bytes
from .tiles import TILES

# The first GPUs whose kernels may start before their predecessor ends.
CAPABILITY = (9, 0)
# Weights of fewer bytes end before loading ahead pays, and short rows are summed up too often
# (bench/NOTES.md, "One row, by programs that stay").
MIN_BYTES, MIN_ROW_BYTES = 8 << 20, 4 << 10
# A program's memory holds some rows.
MAX_ROW_BYTES = 32 << 10
STEP_BYTES = 16 << 10


class StreamConfig(NamedTuple):
    """Tile of gemv_streamed_kernel: weight rows of an iteration, programs a multiprocessor."""

    block_n: int
    programs: int
    num_warps: int
    num_stages: int


class Stretch(NamedTuple):
    """Rows of each program, programs, and iterations of a program as a power of two."""

    rows: int
    programs: int
    steps: int


def stretch_of(n: int, config: StreamConfig, gated: bool, device: torch.device) -> Stretch:
    """The shares of n weight rows; of a gated weight a row of the gate's and its partner's."""
    unit = max(config.block_n, 2) if gated else config.block_n
    rows = cdiv(cdiv(n, config.programs * num_sms(device)), unit) * unit
    return Stretch(rows, cdiv(n, rows), next_power_of_2(rows // config.block_n))


def fit(config: StreamConfig, row_bytes: int, n: int, device: torch.device) -> StreamConfig:
    """The config with no more rows and stages than a program has, and than fit its memory."""
    rows = cdiv(n, config.programs * num_sms(device))
    block_n = min(config.block_n, next_power_of_2(rows))
    # The rest is for sums between warps.
    room = (shared_bytes(device) - (8 << 10)) // config.programs
    while block_n > 1 and block_n * row_bytes > room:
        block_n //= 2
    most = min(cdiv(rows, block_n), room // (block_n * row_bytes)) + 1
    return config._replace(block_n=block_n, num_stages=max(min(config.num_stages, most), 2))


def plan_streamed(n: int, k: int, device: torch.device) -> StreamConfig | None:
    """The tile of one row times an [n, k] weight of 16-bit floats.

    None where this kernel does not take it, or another is faster.
    """
    row_bytes = 2 * next_power_of_2(k)
    if k % 16 or row_bytes > MAX_ROW_BYTES or capability(device) < CAPABILITY:
        return None
    known = TILES.get(chip_name(device), {}).get((n, k))
    if known is not None:
        return StreamConfig(*known)
    if row_bytes < MIN_ROW_BYTES or n * row_bytes < MIN_BYTES:
        return None
    # What is best for most of the shapes in the table.
    tile = StreamConfig(max(STEP_BYTES // row_bytes, 1), 2, 4, 8)
    return fit(tile, row_bytes, n, device)
