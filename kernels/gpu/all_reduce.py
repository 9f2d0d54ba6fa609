"""all_reduce and all_gather: what a mesh's GPUs exchange, through each other's memory.

Ordinary kernels, so a CUDA graph holds them as it holds any other, and no host takes part: every
rank writes a piece of its rows, tells its peers, waits for theirs and reads them
(waiting_exchange.py). Outside of graphs a host launches every rank's kernel: there the streams wait
for one another's events, and plain kernels read the addends where they are (direct_exchange.py).
Sums are added in the ranks' order in float32: every rank computes the same bits, whatever the
timing and whichever the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from ..weights import Norm, share
from .direct_exchange import direct_gather_kernel, direct_sum_kernel
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options
from .peers import Peers, Pending
from .waiting_exchange import (
    all_gather_kernel,
    all_reduce_kernel,
    flagged_sum_kernel,
    two_shot_kernel,
)

# Elements of one piece of a sum without a norm, and of a gathered row.
PIECE = 4096

# Bytes from which on three ranks or more add up a part each. Between two ranks as much travels
# either way. Where it crosses has yet to be measured between GPUs (bench/exchange.py).
TWO_SHOT_BYTES = 1 << 20

R = TypeVar("R")


def all_reduce(x: torch.Tensor, peers: Peers) -> Pending[torch.Tensor]:
    """The ranks' sum of ``x``, of any shape: a new tensor, the same bits on every rank.

    Every rank must launch it, with an x of the same shape and type.

    Raises:
        ValueError: x is not contiguous or not on a GPU.
    """
    check_tensors(x=x)
    y = torch.empty_like(x)
    width = min(PIECE, next_power_of_2(x.numel()))
    return _pending_sum(y, x, x, None, y, peers, width)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, peers: Peers
) -> Pending[tuple[torch.Tensor, torch.Tensor]]:
    """(norm(sum), sum), the sum being residual + the ranks' x; it is written into ``residual``.

    x, residual: [M, H]. Every rank must launch it, with an x of the same shape and type.

    Raises:
        ValueError: a wrong shape, layout or device, or rows longer than the peers' buffers.
    """
    check_tensors(x=x, residual=residual, norm_weight=norm.weight)
    rows, hidden = x.shape
    check_shape("residual", residual, rows, hidden)
    check_shape("norm_weight", norm.weight, hidden)
    if next_power_of_2(hidden) * x.element_size() > peers.half_bytes:
        raise ValueError(f"rows of {hidden} values do not fit into {peers.half_bytes} bytes")
    y = torch.empty_like(x)
    return _pending_sum((y, residual), x, residual, norm, y, peers, hidden)


def _pending_sum(
    result: R,
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: Norm | None,
    y: torch.Tensor,
    peers: Peers,
    width: int,
) -> Pending[R]:
    """The sum in rows of ``width`` elements."""
    rows, block = cdiv(x.numel(), width), next_power_of_2(width)
    weight, eps, weight_offset = norm or Norm(x, 0.0)
    tensors = (residual, weight, y)
    numbers = (width, x.numel(), eps, weight_offset)
    shape = {"HAS_NORM": norm is not None, "WORLD": peers.world}

    def direct(addresses: Sequence[int]) -> None:
        direct_sum_kernel[(rows,)](
            *tensors, *addresses, *numbers, BLOCK=block, num_warps=_num_warps(block), **shape
        )

    constants = {**shape, **_constants(block, peers)}
    args: tuple[Any, ...]
    lost = (peers.lost, peers.lost_on_host)
    row_bytes = min(width, x.numel()) * x.element_size()
    if rows <= peers.max_flagged_rows and row_bytes % 4 == 0 and x.nbytes % 4 == 0:
        kernel, grid = flagged_sum_kernel, rows
        words = (width * x.element_size() // 4, x.nbytes // 4)
        memory = (peers.flagged, peers.flagged_epochs, *lost)
        args = (x, *tensors, *memory, *words, eps, weight_offset, peers.max_ns)
        constants |= {
            "HALF": peers.flagged_words,
            "WORDS": max(block * x.element_size() // 4, 1),
        }
    else:
        kernel, grid = all_reduce_kernel, min(rows, peers.max_programs)
        args = (x, *tensors, *_memory(peers), rows, *numbers, peers.max_ns)
        constants |= {
            "HALF": peers.half_bytes // x.element_size(),
            "BLOCK": block,
            "ROWS": _pieces(rows, block, x, peers),
        }
        slices = next_power_of_2(peers.world)
        if peers.world > 2 and x.nbytes >= TWO_SHOT_BYTES and block >= slices:
            kernel = two_shot_kernel
            needed = next_power_of_2(cdiv(rows, grid))
            constants |= {"SLICE": block // slices, "ROWS": min(constants["ROWS"], needed)}
    return Pending(result, x, peers, kernel, grid, args, constants, direct)


def all_gather(x: torch.Tensor, columns: int, peers: Peers) -> Pending[torch.Tensor]:
    """[..., a rank's share of the columns] of each rank -> [..., columns], in the ranks' order.

    Every rank must launch it, with the same columns, type and leading dimensions.

    Raises:
        ValueError: x is not contiguous, not on a GPU, or not as wide as the rank's share.
    """
    check_tensors(x=x)
    begin, end = share(columns, peers.rank, peers.world)
    if x.shape[-1] != end - begin:
        raise ValueError(f"rank {peers.rank} has {x.shape[-1]} columns, its share is {end - begin}")
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    widest = cdiv(columns, peers.world)
    block = min(PIECE, next_power_of_2(widest))
    rows, pieces = y.numel() // columns, cdiv(widest, block)
    count = rows * pieces
    unit = 1 if columns % peers.world else math.gcd(columns // peers.world, 16)
    shape = {"PIECES": pieces, "WORLD": peers.world, "BLOCK": block, "UNIT": unit}

    def direct(addresses: Sequence[int]) -> None:
        direct_gather_kernel[(count,)](y, *addresses, columns, num_warps=_num_warps(block), **shape)

    constants = {
        **shape,
        **_constants(block, peers),
        "HALF": peers.half_bytes // x.element_size(),
        "ROUND": _pieces(count, block, x, peers),
    }
    args = (x, y, *_memory(peers), rows, columns, peers.max_ns)
    grid = min(count, peers.max_programs)
    return Pending(y, x, peers, all_gather_kernel, grid, args, constants, direct)


def _memory(peers: Peers) -> tuple[torch.Tensor, ...]:
    return peers.buffers, peers.flags, peers.epochs, peers.lost, peers.lost_on_host


def _pieces(count: int, block: int, x: torch.Tensor, peers: Peers) -> int:
    """Pieces of a round: one where every program has one, else all that fit."""
    return 1 if count <= peers.max_programs else peers.half_bytes // (block * x.element_size())


def _constants(block: int, peers: Peers) -> dict[str, Any]:
    """Of every kernel that waits."""
    return {
        "RANK": peers.rank,
        # What waits early for a kernel holds the device, which on a shared one the peer needs.
        "EARLY": peers.on_device == 1,
        "num_warps": _num_warps(block),
        **pdl_options(),
    }


def _num_warps(block: int) -> int:
    """16 values a thread: two 16-byte loads each of a 16-bit type."""
    return min(max(block // 512, 1), 16)
