"""Tiles of prefill attention on Hopper GPUs, and which layers have one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .launch import next_power_of_2
from .paged_kv import KVShape

# Of Triton, whose Gluon is not stable yet: those that hopper_attention was compiled and run with.
GLUON_VERSIONS = ("3.6",)
# Fewer rows are left to the plain kernel's small tiles, more requests to its lanes.
MIN_ROWS = 128
MAX_REQS = 256


class HopperTile(NamedTuple):
    """Warpgroups of 64 query rows, keys a step, stages of keys and values in shared memory."""

    warpgroups: int
    block_n: int
    num_stages: int
    registers: int  # of a thread of the warpgroups


# By elements of a head: (least rows, tile), the last that fits. From the sweep of bench/NOTES.md,
# "Prefill attention on an H200".
TILES = {
    64: (
        (MIN_ROWS, HopperTile(1, 64, 6, 232)),
        (512, HopperTile(2, 64, 4, 232)),
        (2048, HopperTile(3, 64, 4, 160)),
    ),
    128: (
        (MIN_ROWS, HopperTile(1, 64, 6, 232)),
        (512, HopperTile(2, 64, 4, 232)),
    ),
    256: (
        (MIN_ROWS, HopperTile(1, 64, 2, 232)),
        (2048, HopperTile(2, 64, 2, 232)),
    ),
}


def has_gluon(device: torch.device) -> bool:
    """True if hopper_attention runs on a device."""
    version = ".".join(triton.__version__.split(".")[:2])
    if device.type != "cuda" or version not in GLUON_VERSIONS:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def plan_hopper(
    shape: KVShape,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    rows: int,
    num_reqs: int,
    *,
    sliding_window: int,
    causal: bool,
    has_slopes: bool,
) -> HopperTile | None:
    """The tile for ``rows`` query tokens of ``num_reqs`` requests; None: the plain kernel's.

    Boxes of a cache must hold whole swizzled rows of blocks, so sizes are powers of two.
    """
    if dtype not in (torch.bfloat16, torch.float16) or cache_dtype != dtype:
        return None
    size = shape.block_size
    if size < 8 or size != next_power_of_2(size) or shape.group > 64 or num_reqs > MAX_REQS:
        return None
    if has_slopes or (sliding_window > 0 and not causal):
        return None
    tile = None
    for least, candidate in TILES.get(shape.head_dim, ()):
        if rows >= least:
            tile = candidate
    return tile
