"""all_reduce and all_gather: what a mesh's GPUs exchange, through each other's memory.

Ordinary kernels, so a CUDA graph holds them as it holds any other, and no host takes part. Every
rank copies a piece of its rows into its own buffer, raises a flag in each peer's memory, waits for
the peers' flags in its own, and reads the peers' pieces. Sums are added in the ranks' order in
float32: every rank computes the same bits, whatever the timing.

Few rows travel with their flags instead, one beside each four bytes, straight into the peers'
buffers: nobody waits for a store before it raises a flag, nor reads over the link.

A program of one rank meets the programs of the same number on the others. Its buffer has two
halves, used in turns: a rank that writes a half again has met its peers since they read it. Rounds
are counted on the device, so that a graph's next replay goes on where the last one ended.

Outside of graphs a host launches every rank's kernel: there the streams wait for one another's
events, and plain kernels read the addends where they are.

A wait ends after a number of polls, and ``Peers.lost`` is set: a rank that never comes is an
error, not a hang.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl

from ..weights import Norm, share
from .compile_only import is_compiling
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
# Rows whose words carry flags, which doubles what travels (bench/exchange.py).
MAX_FLAGGED_ROWS = 32
# The direct kernels' arguments: addresses of up to eight ranks.
MAX_WORLD = 8
ADDRESSES = tuple(f"a{rank}" for rank in range(MAX_WORLD))

R = TypeVar("R")


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


@triton.jit(do_not_specialize=["M", "max_polls"])
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
    EARLY: tl.constexpr,  # let the next kernel start while this one waits
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    in_row = cols < H
    element: tl.constexpr = x.dtype.element_ty
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
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
                at = row * H + cols
                total = _normed(
                    total, residual, norm_weight, at, cols, mask, H, eps, weight_offset, element
                )
            tl.store(y + row * H + cols, total.to(element), mask=mask)
    tl.store(epochs + pid, epoch)


@triton.jit
def _from_words(words, element: tl.constexpr):
    """Words of four bytes, int32 [W] -> float32 [W]: their lower halves and their upper halves.

    Of float32 a word is a number, and the second is 0.
    """
    if element == tl.float32:
        low = words.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    else:
        low = words.to(tl.int16).to(element, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(element, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _to_words(low, high, element: tl.constexpr):
    """``_from_words`` backwards, rounded to the element type."""
    if element == tl.float32:
        words = low.to(tl.int32, bitcast=True)
    else:
        lower = low.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        upper = high.to(element).to(tl.int16, bitcast=True).to(tl.int32)
        words = lower | (upper << 16)
    return words


@triton.jit(do_not_specialize=["max_polls"])
def flagged_sum_kernel(
    x,  # [M, H]: this rank's addend; M is the grid's size
    residual,  # [M, H]: becomes the sum where there is a norm
    norm_weight,  # [H]
    y,  # [M, H]
    buffers,  # [WORLD] int64: addresses of int64 [MAX_FLAGGED_ROWS, 2, WORLD, HALF]
    epochs,  # int32 [MAX_PROGRAMS]
    lost,  # int32 [1]
    lost_on_host,  # int32 [1]
    W,  # words of a row, which is a whole number of them
    NUM_WORDS,  # M * W, or less where the last row is shorter
    eps,
    weight_offset,
    max_polls,
    HAS_NORM: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    HALF: tl.constexpr,  # words of one rank's row
    WORDS: tl.constexpr,  # >= W
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """``all_reduce_kernel`` of a row a program, whose words carry the round's number."""
    row = tl.program_id(0)
    element: tl.constexpr = x.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // x.dtype.element_ty.primitive_bitwidth
    word_pointer: tl.constexpr = tl.pointer_type(tl.int32)
    cols = tl.arange(0, WORDS)
    at = row.to(tl.int64) * W + cols
    mask = (cols < W) & (at < NUM_WORDS)
    if HAS_NORM:
        g = tl.load(norm_weight.to(word_pointer) + cols, mask=mask, other=0)
        g_low, g_high = _from_words(g, element)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs + row) + 1
    own = tl.load(x.to(word_pointer) + at, mask=mask, other=0)
    half = ((row * 2 + (epoch & 1)) * WORLD * HALF).to(tl.int64)
    # The round's number, and under it four bytes.
    packed = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(WORLD):
        if r != RANK:
            theirs = tl.load(buffers + r).to(tl.pointer_type(tl.int64)) + half + RANK * HALF
            tl.store(tl.multiple_of(theirs, 16) + cols, packed)
    here = tl.load(buffers + RANK).to(tl.pointer_type(tl.int64)) + half
    patience = tl.where(tl.load(lost) == 0, max_polls, 0)
    low, high = _from_words(tl.zeros_like(own), element)
    for r in tl.static_range(WORLD):
        if r == RANK:
            words = own
        else:
            place = tl.multiple_of(here + r * HALF, 16) + cols
            polls = 0
            arrived = tl.load(place, volatile=True)
            missing = tl.sum(((arrived >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
            while (missing != 0) & (polls < patience):
                arrived = tl.load(place, volatile=True)
                missing = tl.sum(((arrived >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
                polls += 1
            if missing != 0:
                tl.store(lost, 1)
                tl.store(lost_on_host, 1)
            words = arrived.to(tl.int32)
        part_low, part_high = _from_words(words, element)
        low += part_low
        high += part_high
    if HAS_NORM:
        # As an addend that another kernel has rounded.
        low, high = _from_words(_to_words(low, high, element), element)
        before = tl.load(residual.to(word_pointer) + at, mask=mask, other=0)
        before_low, before_high = _from_words(before, element)
        total = _to_words(low + before_low, high + before_high, element)
        tl.store(residual.to(word_pointer) + at, total, mask=mask)
        low, high = _from_words(total, element)
        low, high = tl.where(mask, low, 0.0), tl.where(mask, high, 0.0)
        scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / (W * PER_WORD) + eps)
        low, high = low * scale * (g_low + weight_offset), high * scale * (g_high + weight_offset)
    tl.store(y.to(word_pointer) + at, _to_words(low, high, element), mask=mask)
    tl.store(epochs + row, epoch)


@triton.jit(do_not_specialize=["M", "max_polls"])
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
    UNIT: tl.constexpr,  # shares are whole numbers of it
    ROUND: tl.constexpr,  # pieces; ROUND * BLOCK <= HALF
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    element: tl.constexpr = x.dtype.element_ty
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs + pid)
    own_begin = N * RANK // WORLD  # as weights.share shares them
    own_width = tl.multiple_of(N * (RANK + 1) // WORLD - own_begin, UNIT)
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
            begin = tl.multiple_of(N * r // WORLD, UNIT)
            width = tl.multiple_of(N * (r + 1) // WORLD - begin, UNIT)
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
    tl.store(epochs + pid, epoch)


@triton.jit
def _address(r: tl.constexpr, a0, a1, a2, a3, a4, a5, a6, a7):
    """The r-th of eight addresses."""
    addresses = (a0, a1, a2, a3, a4, a5, a6, a7)
    return addresses[r]


@triton.jit(do_not_specialize=[*ADDRESSES])
def direct_sum_kernel(
    residual,  # [M, H]: becomes the sum where there is a norm
    norm_weight,  # [H]
    y,  # [M, H]
    a0,  # the ranks' addends [M, H]: WORLD addresses
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    H,
    NUMEL,
    eps,
    weight_offset,
    HAS_NORM: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,  # >= H
):
    """A row a program, of addends that are there and stay there."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    at = row * H + cols
    mask = (cols < H) & (at < NUMEL)
    element: tl.constexpr = y.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(WORLD):
        address = _address(r, a0, a1, a2, a3, a4, a5, a6, a7)
        x = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
        # Another device's memory is not kept coherent in this one's caches.
        v = tl.load(x + at, mask=mask, other=0.0, cache_modifier=".cv")
        total += v.to(tl.float32)
    if HAS_NORM:
        total = _normed(
            total, residual, norm_weight, at, cols, mask, H, eps, weight_offset, element
        )
    tl.store(y + at, total.to(element), mask=mask)


@triton.jit(do_not_specialize=[*ADDRESSES])
def direct_gather_kernel(
    y,  # [M, N]: all ranks' columns
    a0,  # the ranks' columns: WORLD addresses
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    N,
    PIECES: tl.constexpr,  # of a row; the widest rank's
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # shares are whole numbers of it
):
    """A piece of every rank a program."""
    row = (tl.program_id(0) // PIECES).to(tl.int64)
    cols = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    element: tl.constexpr = y.dtype.element_ty
    for r in tl.static_range(WORLD):
        begin = tl.multiple_of(N * r // WORLD, UNIT)
        width = tl.multiple_of(N * (r + 1) // WORLD - begin, UNIT)
        address = _address(r, a0, a1, a2, a3, a4, a5, a6, a7)
        x = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
        mask = cols < width
        v = tl.load(x + row * width + cols, mask=mask, other=0.0, cache_modifier=".cv")
        tl.store(y + row * N + begin + cols, v, mask=mask)


@triton.jit
def _normed(
    total, residual, norm_weight, at, cols, mask, H, eps, weight_offset, element: tl.constexpr
):
    """norm(residual + total) of a row, in float32; the sum becomes the residual."""
    g = tl.load(norm_weight + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
    # As an addend that another kernel has rounded.
    total = total.to(element).to(tl.float32)
    total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(element)
    tl.store(residual + at, rounded, mask=mask)
    total = tl.where(mask, rounded.to(tl.float32), 0.0)
    return total * tl.rsqrt(tl.sum(total * total, 0) / H + eps) * g


class Peers:
    """One rank's side of the memory that its mesh exchanges through.

    buffers, flags, flagged: int64 [world] on this rank's device, every rank's addresses; epochs and
    flagged_epochs: int32 [MAX_PROGRAMS]; lost: int32 [1] on the device, and ``lost_on_host`` in
    pinned memory, not 0 once a rank has not come. ``half_bytes``, ``flagged_words``: of each
    program's two halves. ``on_device``: ranks on one device, at most. ``max_polls``: of one wait.
    ``kept``: what the addresses point to on this device.
    """

    def __init__(
        self,
        rank: int,
        devices: Sequence[torch.device],
        half_bytes: int,
        memory: Sequence[Sequence[torch.Tensor]],
        max_polls: int,
    ) -> None:
        self.rank, self.world = rank, len(devices)
        self.device = devices[rank]
        self.on_device = max(list(devices).count(device) for device in devices)
        # All of them on a device must be resident at once.
        self.max_programs = MAX_PROGRAMS // self.on_device
        self.half_bytes, self.flagged_words = half_bytes, half_bytes // 4
        self.max_polls = max_polls
        self.kept = [tensors[rank] for tensors in memory]
        self.buffers, self.flags, self.flagged = (self._addresses(tensors) for tensors in memory)
        self.epochs = self._ints(MAX_PROGRAMS)
        self.flagged_epochs = self._ints(MAX_PROGRAMS)
        self.lost = self._ints(1)
        pinned = self.device.type == "cuda"
        self.lost_on_host = torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        # Launches whose kernels are on this device: those that differ in nothing but sizes.
        self.loaded: set[Hashable] = set()

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        addresses = [tensor.data_ptr() for tensor in tensors]
        return torch.tensor(addresses, dtype=torch.int64, device=self.device)

    def _ints(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


def make_peers(
    devices: Sequence[torch.device], row_bytes: int, max_polls: int = MAX_POLLS
) -> list[Peers]:
    """Exchange memory for rows of up to ``row_bytes`` between the ranks on ``devices``."""
    world = len(devices)
    half = max(HALF_BYTES, next_power_of_2(row_bytes))

    def zeros(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(count, dtype=dtype, device=device) for device in devices]

    memory = (
        zeros(MAX_PROGRAMS * 2 * half, torch.uint8),
        zeros(MAX_PROGRAMS * world, torch.int32),
        zeros(MAX_FLAGGED_ROWS * 2 * world * (half // 4), torch.int64),
    )
    for a in devices:
        for b in devices:
            if a != b:
                # torch lets two devices reach each other's memory at the first copy between them.
                torch.zeros(1, device=a).to(b)
    return [Peers(rank, devices, half, memory, max_polls) for rank in range(world)]


class Pending(Generic[R]):
    """An exchange that every rank of a mesh has to launch, and what it will have written.

    In a graph by ``launch``, whose kernel waits for the peers'. It is compiled and on the device
    from here on, so that it waits for nothing else. Kernel by kernel by ``launch_directly``, once
    the streams have waited for each other.

    Args:
        part: what this rank gives.
        grid: programs of the waiting kernel.
        direct: launches the other one, given the addresses of all ranks' parts.
    """

    def __init__(
        self,
        result: R,
        part: torch.Tensor,
        peers: Peers,
        kernel: Any,
        grid: int,
        args: Sequence[Any],
        constants: dict[str, Any],
        direct: Callable[[Sequence[int]], object],
    ) -> None:
        self.result, self.part, self._direct = result, part, direct
        self._launch = functools.partial(kernel[(grid,)], *args, **constants) if grid else None
        if not grid or peers.device.type == "cpu" or is_compiling():
            return
        # What a kernel is compiled for: sizes that are whole numbers of vectors, too.
        sizes = (arg % 16 == 0 for arg in args if isinstance(arg, int))
        key = (kernel, part.dtype, *sizes, *sorted(constants.items()))
        if key not in peers.loaded:
            # ``run`` loads the code, which is otherwise left to the first launch.
            _ = kernel.warmup(*args, grid=(grid,), **constants).run
            peers.loaded.add(key)

    def launch(self) -> R:
        """Launch the kernel that waits, on the current stream."""
        if self._launch is not None:
            self._launch()
        return self.result

    def launch_directly(self, parts: Sequence[torch.Tensor]) -> R:
        """Launch the kernel that reads the ranks' parts where they are, on the current stream."""
        if self._launch is not None:
            addresses = [part.data_ptr() for part in parts]
            self._direct([*addresses, *[0] * (MAX_WORLD - len(addresses))])
        return self.result


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
    if rows <= MAX_FLAGGED_ROWS and row_bytes % 4 == 0 and x.nbytes % 4 == 0:
        kernel, grid = flagged_sum_kernel, rows
        words = (width * x.element_size() // 4, x.nbytes // 4)
        memory = (peers.flagged, peers.flagged_epochs, *lost)
        args = (x, *tensors, *memory, *words, eps, weight_offset, peers.max_polls)
        constants |= {
            "HALF": peers.flagged_words,
            "WORDS": max(block * x.element_size() // 4, 1),
        }
    else:
        kernel, grid = all_reduce_kernel, min(rows, peers.max_programs)
        args = (x, *tensors, *_memory(peers), rows, *numbers, peers.max_polls)
        constants |= {
            "HALF": peers.half_bytes // x.element_size(),
            "BLOCK": block,
            "ROWS": _pieces(rows, block, x, peers),
        }
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
    args = (x, y, *_memory(peers), rows, columns, peers.max_polls)
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
