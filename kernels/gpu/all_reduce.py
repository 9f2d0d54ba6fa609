"""all_reduce and all_gather: what a mesh's GPUs exchange, through each other's memory.

Ordinary kernels, so a CUDA graph holds them as it holds any other, and no host takes part. Every
rank copies a piece of its rows into its own buffer, raises a flag in each peer's memory, waits for
the peers' flags in its own, and reads the peers' pieces. Sums are added in the ranks' order in
float32: every rank computes the same bits, whatever the timing.

A program of one rank meets the programs of the same number on the others. Its buffer has two
halves, used in turns: a rank that writes a half again has met its peers since they read it. Rounds
are counted on the device, so that a graph's next replay goes on where the last one ended.

A wait ends after a number of polls, and ``Peers.lost`` is set: a rank that never comes is an
error, not a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..weights import Norm, share
from .launch import cdiv, check_shape, check_tensors, next_power_of_2, pdl_options

# Programs of a launch wait for one another across devices, so all must be resident at once: fewer
# than the multiprocessors of any supported GPU (an H100 PCIe has 114).
MAX_PROGRAMS = 96
# Of one half of a program's buffer: a round that exchanges less leaves the links idle while it
# meets (bench/exchange.py).
HALF_BYTES = 64 << 10
# Elements of one piece of a sum without a norm, and of a gathered row.
PIECE = 4096
# Some 10 s of an H200 at 0.32 us a poll (bench/exchange.py): later than any rank that will come.
MAX_POLLS = 1 << 25


@triton.jit
def _meet(
    flags,
    epoch,
    lost,
    lost_on_host,
    max_polls,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Tell each peer that this program's piece is written, and wait for theirs."""
    pid = tl.program_id(0)
    tl.debug_barrier()  # every thread's stores come before the flags
    for r in tl.static_range(WORLD):
        if r != RANK:
            theirs = tl.load(flags + r).to(tl.pointer_type(tl.int32)) + pid * WORLD + RANK
            tl.atomic_xchg(theirs, epoch, sem="release", scope="sys")
    own = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + pid * WORLD
    # Who has lost a rank waits for none again.
    patience = tl.where(tl.load(lost) == 0, max_polls, 0)
    for r in tl.static_range(WORLD):
        if r != RANK:
            polls = 0
            seen = tl.atomic_add(own + r, 0, sem="acquire", scope="sys")
            while (seen - epoch < 0) & (polls < patience):
                seen = tl.atomic_add(own + r, 0, sem="acquire", scope="sys")
                polls += 1
            if seen - epoch < 0:
                tl.store(lost, 1)
                tl.store(lost_on_host, 1)
    tl.debug_barrier()


@triton.jit
def all_reduce_kernel(
    x,  # [M, H]: this rank's addend
    residual,  # [M, H]: becomes the sum where there is a norm
    norm_weight,  # [H]
    y,  # [M, H]: the ranks' sum, or its norm
    buffers,  # [WORLD] int64: addresses of [MAX_PROGRAMS, 2, HALF]
    flags,  # [WORLD] int64: addresses of int32 [MAX_PROGRAMS, WORLD]
    epochs,  # int32 [MAX_PROGRAMS]
    lost,  # int32 [1]
    lost_on_host,  # int32 [1]
    M,
    H,
    NUMEL,  # M * H, or less where the last row is shorter
    eps,
    weight_offset,
    max_polls,
    HAS_NORM: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    HALF: tl.constexpr,  # elements
    BLOCK: tl.constexpr,  # >= H
    ROWS: tl.constexpr,  # of a round; ROWS * BLOCK <= HALF
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    in_row = cols < H
    element: tl.constexpr = x.dtype.element_ty
    if HAS_NORM:
        g = tl.load(norm_weight + cols, mask=in_row, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs + pid)
    for first in range(pid, M, step * ROWS):
        epoch += 1
        half = ((pid * 2 + (epoch & 1)) * HALF).to(tl.int64)
        own = tl.load(buffers + RANK).to(tl.pointer_type(element)) + half
        for i in range(ROWS):
            row = (first + i * step).to(tl.int64)
            mask = in_row & (row * H + cols < NUMEL)
            v = tl.load(x + row * H + cols, mask=mask, other=0.0)
            tl.store(tl.multiple_of(own, 16) + i * BLOCK + cols, v, mask=mask)
        _meet(flags, epoch, lost, lost_on_host, max_polls, RANK, WORLD)
        for i in range(ROWS):
            row = (first + i * step).to(tl.int64)
            mask = in_row & (row * H + cols < NUMEL)
            total = tl.zeros([BLOCK], tl.float32)
            for r in tl.static_range(WORLD):
                theirs = tl.load(buffers + r).to(tl.pointer_type(element)) + half
                v = tl.load(
                    tl.multiple_of(theirs, 16) + i * BLOCK + cols,
                    mask=mask,
                    other=0.0,
                    cache_modifier=".cv",
                )
                total += v.to(tl.float32)
            if HAS_NORM:
                # As an addend that another kernel has rounded.
                total = total.to(element).to(tl.float32)
                total += tl.load(residual + row * H + cols, mask=mask, other=0.0).to(tl.float32)
                rounded = total.to(element)
                tl.store(residual + row * H + cols, rounded, mask=mask)
                total = rounded.to(tl.float32)
                total = total * tl.rsqrt(tl.sum(total * total, 0) / H + eps) * g
            tl.store(y + row * H + cols, total.to(element), mask=mask)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(epochs + pid, epoch)


@triton.jit
def all_gather_kernel(
    x,  # [M, OWN]: this rank's columns
    y,  # [M, N]: all ranks'
    buffers,
    flags,
    epochs,
    lost,
    lost_on_host,
    M,
    N,
    max_polls,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    HALF: tl.constexpr,
    PIECES: tl.constexpr,  # of a row; the widest rank's
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,  # pieces; ROUND * BLOCK <= HALF
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    element: tl.constexpr = x.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs + pid)
    own_width = N * (RANK + 1) // WORLD - N * RANK // WORLD  # as weights.share shares them
    for first in range(pid, M * PIECES, step * ROUND):
        epoch += 1
        half = ((pid * 2 + (epoch & 1)) * HALF).to(tl.int64)
        own = tl.load(buffers + RANK).to(tl.pointer_type(element)) + half
        for i in range(ROUND):
            piece = first + i * step
            row = (piece // PIECES).to(tl.int64)
            cols = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
            mask = cols < tl.where(row < M, own_width, 0)
            v = tl.load(x + row * own_width + cols, mask=mask, other=0.0)
            tl.store(tl.multiple_of(own, 16) + i * BLOCK + tl.arange(0, BLOCK), v, mask=mask)
        _meet(flags, epoch, lost, lost_on_host, max_polls, RANK, WORLD)
        for r in tl.static_range(WORLD):
            theirs = tl.load(buffers + r).to(tl.pointer_type(element)) + half
            begin = N * r // WORLD
            width = N * (r + 1) // WORLD - begin
            for i in range(ROUND):
                piece = first + i * step
                row = (piece // PIECES).to(tl.int64)
                cols = (piece % PIECES) * BLOCK + tl.arange(0, BLOCK)
                mask = cols < tl.where(row < M, width, 0)
                v = tl.load(
                    tl.multiple_of(theirs, 16) + i * BLOCK + tl.arange(0, BLOCK),
                    mask=mask,
                    other=0.0,
                    cache_modifier=".cv",
                )
                tl.store(y + row * N + begin + cols, v, mask=mask)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(epochs + pid, epoch)


@dataclass(frozen=True, eq=False)
class Peers:
    """One rank's side of the memory that its mesh exchanges through.

    buffers, flags: int64 [world] on this rank's device, every rank's addresses; epochs: int32
    [MAX_PROGRAMS]; lost: int32 [1] on the device and ``lost_on_host`` in pinned memory, not 0 once
    a rank has not come. ``half_bytes``: of each program's two. ``kept``: what the addresses point
    to on this device. ``max_polls``: of one wait.
    """

    rank: int
    world: int
    half_bytes: int
    buffers: torch.Tensor
    flags: torch.Tensor
    epochs: torch.Tensor
    lost: torch.Tensor
    lost_on_host: torch.Tensor
    kept: tuple[torch.Tensor, ...]
    max_polls: int = MAX_POLLS


def make_peers(
    devices: Sequence[torch.device], row_bytes: int, max_polls: int = MAX_POLLS
) -> list[Peers]:
    """Exchange memory for rows of up to ``row_bytes`` between the ranks on ``devices``."""
    world = len(devices)
    half = max(HALF_BYTES, next_power_of_2(row_bytes))
    data = [torch.zeros(MAX_PROGRAMS * 2 * half, dtype=torch.uint8, device=d) for d in devices]
    flags = [torch.zeros((MAX_PROGRAMS, world), dtype=torch.int32, device=d) for d in devices]
    for a in devices:
        for b in devices:
            if a != b:
                # torch lets two devices reach each other's memory at the first copy between them.
                torch.zeros(1, device=a).to(b)
    pinned = devices[0].type == "cuda"

    def addresses(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=device)

    return [
        Peers(
            rank,
            world,
            half,
            addresses(data, device),
            addresses(flags, device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            (data[rank], flags[rank]),
            max_polls,
        )
        for rank, device in enumerate(devices)
    ]


def all_reduce(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    """The ranks' sum of ``x``, of any shape: a new tensor, the same bits on every rank.

    Every rank must launch it, with an x of the same shape and type.

    Raises:
        ValueError: x is not contiguous or not on a GPU.
    """
    check_tensors(x=x)
    y = torch.empty_like(x)
    width = min(PIECE, next_power_of_2(x.numel()))
    _launch_sum(x, x, None, y, peers, width)
    return y


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, peers: Peers
) -> tuple[torch.Tensor, torch.Tensor]:
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
    _launch_sum(x, residual, norm, y, peers, hidden)
    return y, residual


def _launch_sum(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: Norm | None,
    y: torch.Tensor,
    peers: Peers,
    width: int,
) -> None:
    """Add up, ``width`` elements a row."""
    rows, block = cdiv(x.numel(), width), next_power_of_2(width)
    if not rows:
        return
    weight, eps, weight_offset = norm or Norm(x, 0.0)
    all_reduce_kernel[(min(rows, MAX_PROGRAMS),)](
        x,
        residual,
        weight,
        y,
        *_memory(peers),
        rows,
        width,
        x.numel(),
        eps,
        weight_offset,
        peers.max_polls,
        HAS_NORM=norm is not None,
        ROWS=_pieces(rows, block, x, peers),
        **_layout(block, x, peers),
    )


def all_gather(x: torch.Tensor, columns: int, peers: Peers) -> torch.Tensor:
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
    if rows:
        all_gather_kernel[(min(rows * pieces, MAX_PROGRAMS),)](
            x,
            y,
            *_memory(peers),
            rows,
            columns,
            peers.max_polls,
            PIECES=pieces,
            ROUND=_pieces(rows * pieces, block, x, peers),
            **_layout(block, x, peers),
        )
    return y


def _memory(peers: Peers) -> tuple[torch.Tensor, ...]:
    return peers.buffers, peers.flags, peers.epochs, peers.lost, peers.lost_on_host


def _pieces(count: int, block: int, x: torch.Tensor, peers: Peers) -> int:
    """Pieces of a round: one where every program has one, else all that fit."""
    return 1 if count <= MAX_PROGRAMS else peers.half_bytes // (block * x.element_size())


def _layout(block: int, x: torch.Tensor, peers: Peers) -> dict[str, Any]:
    """The launch's constants."""
    return {
        "RANK": peers.rank,
        "WORLD": peers.world,
        "HALF": peers.half_bytes // x.element_size(),
        "BLOCK": block,
        # 16 values a thread: two 16-byte loads each of a 16-bit type.
        "num_warps": min(max(block // 512, 1), 16),
        **pdl_options(),
    }
