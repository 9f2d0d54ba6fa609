"""Kernels of an exchange in a graph: each waits for those of the other ranks.

A program of one rank meets the programs of the same number on the others. Its buffer has two
halves, used in turns: a rank that writes a half again has met its peers since they read it. Rounds
are counted on the device, so that a graph's next replay goes on where the last one ended.

Of many bytes between three ranks or more each rank adds up a part of the columns alone, and reads
the other parts' sums from its peers: fewer bytes over the links than reading every rank's addends.

Few rows travel with their flags instead, one beside each four bytes, straight into the peers'
buffers: nobody waits for a store before it raises a flag, nor reads over the link.

A wait ends after ``max_ns``, and ``lost`` is set: a rank that never comes is an error, not a hang.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Polls between two looks at the clock, which take longer than a poll (bench/exchange.py).
POLLS_A_LOOK = tl.constexpr(64)


@triton.jit
def normed_sum(
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


@triton.jit
def _is_in_time(polls, began, max_ns):
    """(when the clock was first read, in ns; False once ``max_ns`` have passed since then)."""
    in_time = polls > 0
    if polls % POLLS_A_LOOK == 0:
        now = tl.extra.cuda.globaltimer()
        began = tl.where(began == 0, now, began)
        in_time = now - began < max_ns
    return began, in_time


@triton.jit
def _meet(
    flags,
    epoch,
    lost,
    lost_on_host,
    max_ns,
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
    waits = (tl.load(lost) == 0) & (max_ns > 0)
    polls = 0
    began = tl.full((), 0, tl.int64)
    for r in tl.static_range(WORLD):
        if r != RANK:
            seen = tl.atomic_add(own + r, 0, sem="acquire", scope="sys")
            while (seen - epoch < 0) & waits:
                seen = tl.atomic_add(own + r, 0, sem="acquire", scope="sys")
                polls += 1
                began, waits = _is_in_time(polls, began, max_ns)
            if seen - epoch < 0:
                tl.store(lost, 1)
                tl.store(lost_on_host, 1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["M", "max_ns"])
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
    max_ns,
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
        _meet(flags, epoch, lost, lost_on_host, max_ns, RANK, WORLD)
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
                total = normed_sum(
                    total, residual, norm_weight, at, cols, mask, H, eps, weight_offset, element
                )
            tl.store(y + row * H + cols, total.to(element), mask=mask)
    tl.store(epochs + pid, epoch)


@triton.jit(do_not_specialize=["M", "max_ns"])
def two_shot_kernel(
    x,  # as all_reduce_kernel's
    residual,
    norm_weight,
    y,
    buffers,
    flags,
    epochs,
    lost,
    lost_on_host,
    M,
    H,
    NUMEL,
    eps,
    weight_offset,
    max_ns,
    HAS_NORM: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,  # columns; BLOCK // SLICE of them go round the ranks
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """``all_reduce_kernel`` in two meetings: addends in one half, then sums in the other.

    As there, what is written before a meeting is read before the next one, and written again after
    that: the halves take turns meeting by meeting.
    """
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    in_row = cols < H
    owner = (cols // SLICE) % WORLD
    element: tl.constexpr = x.dtype.element_ty
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    epoch = tl.load(epochs + pid)
    own = tl.multiple_of(tl.load(buffers + RANK).to(tl.pointer_type(element)), 16)
    for first in range(pid, M, step * ROWS):
        addends = ((pid * 2 + ((epoch + 1) & 1)) * HALF).to(tl.int64)
        sums = ((pid * 2 + (epoch & 1)) * HALF).to(tl.int64)
        for i in range(ROWS):
            row = (first + i * step).to(tl.int64)
            mask = in_row & (row * H + cols < NUMEL)
            v = tl.load(x + row * H + cols, mask=mask, other=0.0)
            tl.store(own + addends + i * BLOCK + cols, v, mask=mask)
        _meet(flags, epoch + 1, lost, lost_on_host, max_ns, RANK, WORLD)
        for i in range(ROWS):
            row = (first + i * step).to(tl.int64)
            for s in tl.static_range(RANK, BLOCK // SLICE, WORLD):
                part = s * SLICE + tl.arange(0, SLICE)
                mask = (part < H) & (row * H + part < NUMEL)
                total = tl.zeros([SLICE], tl.float32)
                for r in tl.static_range(WORLD):
                    theirs = tl.load(buffers + r).to(tl.pointer_type(element)) + addends
                    v = tl.load(
                        tl.multiple_of(theirs, 16) + i * BLOCK + part,
                        mask=mask,
                        other=0.0,
                        cache_modifier=".cv",
                    )
                    total += v.to(tl.float32)
                tl.store(own + sums + i * BLOCK + part, total.to(element), mask=mask)
        epoch += 2
        _meet(flags, epoch, lost, lost_on_host, max_ns, RANK, WORLD)
        for i in range(ROWS):
            row = (first + i * step).to(tl.int64)
            mask = in_row & (row * H + cols < NUMEL)
            total = tl.zeros([BLOCK], tl.float32)
            for r in tl.static_range(WORLD):
                theirs = tl.load(buffers + r).to(tl.pointer_type(element)) + sums
                v = tl.load(
                    tl.multiple_of(theirs, 16) + i * BLOCK + cols,
                    mask=mask & (owner == r),
                    other=0.0,
                    cache_modifier=".cv",
                )
                total += v.to(tl.float32)
            if HAS_NORM:
                at = row * H + cols
                total = normed_sum(
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


@triton.jit(do_not_specialize=["max_ns"])
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
    max_ns,
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
    waits = (tl.load(lost) == 0) & (max_ns > 0)
    polls = 0
    began = tl.full((), 0, tl.int64)
    low, high = _from_words(tl.zeros_like(own), element)
    for r in tl.static_range(WORLD):
        if r == RANK:
            words = own
        else:
            place = tl.multiple_of(here + r * HALF, 16) + cols
            arrived = tl.load(place, volatile=True)
            missing = tl.sum(((arrived >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
            while (missing != 0) & waits:
                arrived = tl.load(place, volatile=True)
                missing = tl.sum(((arrived >> 32).to(tl.int32) != epoch).to(tl.int32), 0)
                polls += 1
                began, waits = _is_in_time(polls, began, max_ns)
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


@triton.jit(do_not_specialize=["M", "max_ns"])
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
    max_ns,
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
        _meet(flags, epoch, lost, lost_on_host, max_ns, RANK, WORLD)
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
