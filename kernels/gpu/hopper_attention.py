"""Prefill attention for Hopper's matrix units: warps that load and warps that compute.

A program of one tile of query rows after another holds a loading warp and several warpgroups of 64
rows each. The loading warp copies keys and values of whole blocks of the cache by the copy engine
into a ring of stages; each warpgroup issues the scores of the next keys before the values of the
last ones are added up, so that its softmax runs beside the matrix units.
Algorithm: Shah et al., "FlashAttention-3" (2024), without its turns between warpgroups.

The grid does not depend on lengths, as in attention.py, whose kernel takes what this one does not.

Longer than other files: the warps of one program are functions that share its barriers.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper_plan import HopperTile
from .launch import num_sms, pdl_options
from .paged_kv import block_r, kv_shape

LOG2E = gl.constexpr(1.4426950408889634)
# Elements of a row in 128 bytes, the widest that the copy engine swizzles.
HALF = gl.constexpr(64)
# Rows of a warpgroup's matrix instruction.
ROWS = gl.constexpr(64)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def exp2(x):
    """2 to the x, subnormal results as zero: one instruction."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def computed(sums):
    """Sums, of which none is negative, computed before what follows: by a store that never happens.

    The assembler otherwise moves the wait for the matrix units in front of the softmax, which then
    runs beside nothing (bench/NOTES.md, "Prefill attention on an H200").
    """
    return gl.inline_asm_elementwise(
        """{
            .reg .pred negative;
            .reg .b32 nowhere;
            setp.lt.f32 negative, $1, 0f00000000;
            mov.b32 nowhere, 0;
            @negative st.volatile.shared.f32 [nowhere], $1;
            mov.f32 $0, $1;
        }""",
        "=f,f", [sums], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def request_tiles(query_start_loc, num_reqs, BLOCK_Q: gl.constexpr, BLOCK_R: gl.constexpr):
    """(reqs, tiles, ends of tiles) [BLOCK_R] of each request."""
    each: gl.constexpr = BLOCK_R // 32 if BLOCK_R > 32 else 1
    lanes: gl.constexpr = gl.BlockedLayout([each], [32], [gl.num_warps()], [0])
    reqs = gl.arange(0, BLOCK_R, layout=lanes)
    known = reqs < num_reqs
    starts = gl.load(query_start_loc + reqs, mask=known, other=0)
    ends = gl.load(query_start_loc + reqs + 1, mask=known, other=0)
    tiles = (ends - starts + BLOCK_Q - 1) // BLOCK_Q
    return reqs, tiles, gl.associative_scan(tiles, 0, _add)


@gluon.jit
def find_tile(
    index,
    total,
    reqs,
    tiles,
    ends,
    slots,
    seq_lens,
    query_start_loc,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WINDOW: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """(kv_head, request, slot, q_start, q_len, q_begin, seq_len, and of steps of BLOCK_N keys: the
    first, the first and one past the last that every query sees whole, one past the last).
    """
    kv_head = index % NUM_KV_HEADS
    # Later tiles see more keys and come first.
    unit = total - 1 - index // NUM_KV_HEADS
    request = gl.sum((ends <= unit).to(gl.int32), 0)
    first = gl.sum(gl.where(reqs < request, tiles, 0), 0)
    slot = gl.load(slots + request)
    seq_len = gl.load(seq_lens + request)
    q_start = gl.load(query_start_loc + request)
    q_len = gl.load(query_start_loc + request + 1) - q_start
    q_begin = (unit - first) * BLOCK_Q
    context = seq_len - q_len
    last = context + gl.minimum(q_begin + BLOCK_Q, q_len)  # one past the last query's position
    if CAUSAL:
        end = (last + BLOCK_N - 1) // BLOCK_N
        seen_end = (context + q_begin + 1) // BLOCK_N
    else:
        end = (seq_len + BLOCK_N - 1) // BLOCK_N
        seen_end = seq_len // BLOCK_N
    begin = 0
    seen_begin = 0
    if WINDOW > 0:
        begin = gl.maximum(context + q_begin - WINDOW + 1, 0) // BLOCK_N
        seen_begin = (gl.maximum(last - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N
    # The step at the end, computed first, always has masks.
    seen_end = gl.maximum(gl.minimum(seen_end, end - 1), begin)
    seen_begin = gl.minimum(seen_begin, seen_end)
    return kv_head, slot, q_start, q_len, q_begin, seq_len, begin, seen_begin, seen_end, end


@gluon.jit
def nth_index(turn):
    """The index of a program's turn-th tile: to and fro, so that all get some of the long ones."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)


@gluon.jit
def load_step(
    desc, pages, full, empty, stage, phase, blocks, count, kv_head, offset,
    NUM_KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one step's keys, or values, once the stage is free."""
    PAGE: gl.constexpr = desc.block_shape[0]
    PAGES: gl.constexpr = BLOCK_N // PAGE
    PARTS: gl.constexpr = BLOCK_SIZE // PAGE  # steps of a block, if it is longer than one
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
    for p in gl.static_range(PAGES):
        page = offset * PAGES + p
        # Rows behind the last block are block 0's: they are masked, values are made zeros.
        block = gl.load(blocks + page // PARTS, mask=page // PARTS < count, other=0)
        row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + page % PARTS * PAGE
        for h in gl.static_range(HEAD_DIM // HALF):
            tma.async_copy_global_to_shared(
                desc,
                [row, h * HALF],
                full.index(stage),
                pages.index((stage * (HEAD_DIM // HALF) + h) * PAGES + p),
            )


@gluon.jit
def load_all(
    k_desc, v_desc, k_pages, v_pages, k_full, k_empty, v_full, v_empty, block_table, table_stride,
    slots, seq_lens, query_start_loc, num_reqs,
    NUM_KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    WINDOW: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: keys and values of every tile, from its last step to its first."""
    reqs, tiles, ends = request_tiles(query_start_loc, num_reqs, BLOCK_Q, BLOCK_R)
    total = gl.sum(tiles, 0)
    loaded = 0
    turn = 0
    index = nth_index(turn)
    while index < total * NUM_KV_HEADS:
        kv_head, slot, _q, _l, _b, seq_len, begin, _s, _e, end = find_tile(
            index, total, reqs, tiles, ends, slots, seq_lens, query_start_loc,
            NUM_KV_HEADS, BLOCK_Q, BLOCK_N, WINDOW, CAUSAL,
        )  # fmt: skip
        blocks = block_table + slot.to(gl.int64) * table_stride
        count = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
        for i in range(0, end - begin):
            step = end - 1 - i
            stage = loaded % STAGES
            phase = loaded // STAGES & 1
            load_step(
                k_desc, k_pages, k_full, k_empty, stage, phase, blocks, count, kv_head, step,
                NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, HEAD_DIM,
            )  # fmt: skip
            load_step(
                v_desc, v_pages, v_full, v_empty, stage, phase, blocks, count, kv_head, step,
                NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N, HEAD_DIM,
            )  # fmt: skip
            loaded += 1
        turn += 1
        index = nth_index(turn)


@gluon.jit
def softmax_step(
    scores, row_max, row_sum, q_position, step, seq_len, scale, softcap,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """(weights, row_max, row_sum, alpha) after one more step's dot products.

    scale is in units of log2(e), and row_max in those of the products, or of log2(e) with SOFTCAP.
    """
    if SOFTCAP:
        # tanh(z) = 1 - 2 / (e^2z + 1)
        z = scores * (scale / softcap)
        scores = (softcap * LOG2E) * (1.0 - 2.0 / (exp2(z * 2.0) + 1.0))
        scale = 1.0
    if MASKED:
        position = step * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
        seen = (position < seq_len)[None, :]
        if CAUSAL:
            seen = seen & (position[None, :] <= q_position[:, None])
        if WINDOW > 0:
            seen = seen & (q_position[:, None] - position[None, :] < WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    shift = new_max
    if MASKED:
        # Subtract 0 where no key was seen yet, so that exp2(-inf) gives 0 and not NaN.
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = exp2(scores * scale - (shift * scale)[:, None])
    alpha = exp2((row_max - shift) * scale)
    row_sum = row_sum * alpha + gl.sum(weights, 1)
    return weights, new_max, row_sum, alpha


@gluon.jit
def attend_steps(
    acc, weights, row_max, row_sum, used, q_tile, k_tiles, v_tiles, k_full, k_empty, v_full,
    v_empty, q_position, begin, end, seq_len, scale, softcap,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The state after steps end - 1 .. begin; weights are of the step before, not yet added up."""
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    for step in range(end - 1, begin - 1, -1):
        before = (used - 1) % STAGES
        stage = used % STAGES
        mbarrier.wait(k_full.index(stage), used // STAGES & 1)
        products = warpgroup_mma(
            q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(before), (used - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(products,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, row_max, row_sum, alpha = softmax_step(
            scores, row_max, row_sum, q_position, step, seq_len, scale, softcap,
            SOFTCAP, WINDOW, CAUSAL, MASKED, BLOCK_N, S,
        )  # fmt: skip
        row_sum = computed(row_sum)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
        weights = gl.convert_layout(p.to(weights.dtype), P)
        used += 1
    return acc, weights, row_max, row_sum, used


@gluon.jit
def zero_values_behind(
    v_pages, stage, step, seq_len,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Zeros in place of the values at positions >= seq_len: weights of 0 do not undo a NaN.

    Each warpgroup writes them before its own products; rows before seq_len are written as they are.
    """
    PAGES: gl.constexpr = BLOCK_N // PAGE
    HALVES: gl.constexpr = HEAD_DIM // HALF
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, PAGE, layout=gl.SliceLayout(1, layout))
    for p in range((seq_len - step * BLOCK_N) // PAGE, PAGES):
        valid = step * BLOCK_N + p * PAGE + row < seq_len
        for h in gl.static_range(HALVES):
            page = v_pages.index((stage * HALVES + h) * PAGES + p)
            values = page.load(layout)
            page.store(gl.where(valid[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def compute_all(
    q, out, q_tile, k_tiles, v_tiles, v_pages, k_full, k_empty, v_full, v_empty,
    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
    WARPGROUP: gl.constexpr, SINKS: gl.constexpr, SOFTCAP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr, WINDOW: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_R: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: its 64 rows of every tile."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HALF, HALF // 8], [4, 1], [1, 0])
    reqs, tiles, ends = request_tiles(query_start_loc, num_reqs, BLOCK_Q, BLOCK_R)
    total = gl.sum(tiles, 0)
    used = 0
    turn = 0
    index = nth_index(turn)
    while index < total * NUM_KV_HEADS:
        kv_head, _slot, q_start, q_len, q_begin, seq_len, begin, seen_begin, seen_end, end = (
            find_tile(
                index, total, reqs, tiles, ends, slots, seq_lens, query_start_loc,
                NUM_KV_HEADS, BLOCK_Q, BLOCK_N, WINDOW, CAUSAL,
            )
        )  # fmt: skip
        # Row i of the tile is query token q_begin + i // GROUP, head i % GROUP of the group.
        i = WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
        token = q_begin + i // GROUP
        rows = (q_start + token).to(gl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + i % GROUP
        d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, COPY))
        in_rows = (i < BLOCK_Q * GROUP) & (token < q_len)
        query = gl.load(q + rows[:, None] * HEAD_DIM + d[None, :], mask=in_rows[:, None], other=0.0)
        q_tile.store(query)
        fence_async_shared()
        gl.thread_barrier()

        i = WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        q_position = seq_len - q_len + q_begin + i // GROUP
        row_max = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
        row_sum = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S))
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=ACC)
        stage = used % STAGES
        mbarrier.wait(k_full.index(stage), used // STAGES & 1)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
        products = warpgroup_mma(
            q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(products,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, row_max, row_sum, _alpha = softmax_step(
            scores, row_max, row_sum, q_position, end - 1, seq_len, scale, softcap,
            SOFTCAP, WINDOW, CAUSAL, True, BLOCK_N, S,
        )  # fmt: skip
        weights = gl.convert_layout(p.to(q.dtype.element_ty), P)
        if end * BLOCK_N > seq_len:
            mbarrier.wait(v_full.index(stage), used // STAGES & 1)
            zero_values_behind(v_pages, stage, end - 1, seq_len, HEAD_DIM, BLOCK_N, PAGE)
        used += 1
        acc, weights, row_max, row_sum, used = attend_steps(
            acc, weights, row_max, row_sum, used, q_tile, k_tiles, v_tiles, k_full, k_empty,
            v_full, v_empty, q_position, seen_end, end - 1, seq_len, scale, softcap,
            SOFTCAP, WINDOW, CAUSAL, True, BLOCK_N, STAGES, S, ACC,
        )  # fmt: skip
        acc, weights, row_max, row_sum, used = attend_steps(
            acc, weights, row_max, row_sum, used, q_tile, k_tiles, v_tiles, k_full, k_empty,
            v_full, v_empty, q_position, seen_begin, seen_end, seq_len, scale, softcap,
            SOFTCAP, WINDOW, CAUSAL, False, BLOCK_N, STAGES, S, ACC,
        )  # fmt: skip
        if WINDOW > 0:
            acc, weights, row_max, row_sum, used = attend_steps(
                acc, weights, row_max, row_sum, used, q_tile, k_tiles, v_tiles, k_full, k_empty,
                v_full, v_empty, q_position, begin, seen_begin, seq_len, scale, softcap,
                SOFTCAP, WINDOW, CAUSAL, True, BLOCK_N, STAGES, S, ACC,
            )  # fmt: skip
        before = (used - 1) % STAGES
        mbarrier.wait(v_full.index(before), (used - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(before), count=1)

        if SINKS:
            head = kv_head * GROUP + i % GROUP
            sink = gl.load(sinks + head) * LOG2E
            top = row_max if SOFTCAP else row_max * scale
            row_sum += exp2(sink - top)
        # A row that has seen no key is zero.
        inverse = 1.0 / gl.where(row_sum > 0.0, row_sum, 1.0)
        result = acc * gl.convert_layout(inverse, gl.SliceLayout(1, ACC))[:, None]
        i = WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        token = q_begin + i // GROUP
        rows = (q_start + token).to(gl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + i % GROUP
        d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ACC))
        in_rows = (i < BLOCK_Q * GROUP) & (token < q_len)
        gl.store(
            out + rows[:, None] * HEAD_DIM + d[None, :],
            result.to(out.dtype.element_ty),
            mask=in_rows[:, None],
        )
        turn += 1
        index = nth_index(turn)


@gluon.jit(
    do_not_specialize=["num_reqs"],
    # Views that begin after the decodes.
    do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"],
)
def hopper_prefill_kernel(
    q,  # [T, Hq, Dh]
    k_desc,  # of a cache [blocks * Hkv * BLOCK_SIZE, Dh]: boxes of a block's rows, 64 elements wide
    v_desc,
    block_table,
    table_stride,
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, Hq, Dh]
    sinks,  # [Hq] float32, read if SINKS
    scale,  # in units of log2(e)
    softcap,  # read if SOFTCAP
    num_reqs,
    SINKS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr,  # 0: none
    CAUSAL: gl.constexpr,
    BLOCK_R: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    PAGE: gl.constexpr = k_desc.block_shape[0]
    BLOCK_Q: gl.constexpr = WARPGROUPS * ROWS // GROUP  # query tokens of a tile
    HALVES: gl.constexpr = HEAD_DIM // HALF
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    type: gl.constexpr = q.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    q_tiles = gl.allocate_shared_memory(type, [WARPGROUPS, ROWS, HEAD_DIM], TILE)
    # In memory a tile of keys is columns of 64 elements, and one of them its pages in order.
    boxes: gl.constexpr = STAGES * HALVES * BLOCK_N // PAGE
    k_pages = gl.allocate_shared_memory(type, [boxes, PAGE, HALF], TILE)
    v_pages = gl.allocate_shared_memory(type, [boxes, PAGE, HALF], TILE)
    k_tiles = k_pages._reinterpret(type, [STAGES, BLOCK_N, HEAD_DIM], TILE)
    v_tiles = v_pages._reinterpret(type, [STAGES, BLOCK_N, HEAD_DIM], TILE)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=WARPGROUPS)
        mbarrier.init(v_empty.index(s), count=WARPGROUPS)
    fence_async_shared()
    gl.thread_barrier()
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (compute_all, (
                    q, out, q_tiles.index(0), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    0, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (load_all, (
                    k_desc, v_desc, k_pages, v_pages, k_full, k_empty, v_full, v_empty,
                    block_table, table_stride, slots, seq_lens, query_start_loc, num_reqs,
                    NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (compute_all, (
                    q, out, q_tiles.index(0), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    0, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (compute_all, (
                    q, out, q_tiles.index(1), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    1, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (load_all, (
                    k_desc, v_desc, k_pages, v_pages, k_full, k_empty, v_full, v_empty,
                    block_table, table_stride, slots, seq_lens, query_start_loc, num_reqs,
                    NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
            ],
            [4, 1],
            [REGISTERS, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute_all, (
                    q, out, q_tiles.index(0), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    0, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (compute_all, (
                    q, out, q_tiles.index(1), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    1, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (compute_all, (
                    q, out, q_tiles.index(2), k_tiles, v_tiles, v_pages,
                    k_full, k_empty, v_full, v_empty,
                    slots, seq_lens, query_start_loc, sinks, scale, softcap, num_reqs,
                    2, SINKS, SOFTCAP, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
                (load_all, (
                    k_desc, v_desc, k_pages, v_pages, k_full, k_empty, v_full, v_empty,
                    block_table, table_stride, slots, seq_lens, query_start_loc, num_reqs,
                    NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOW, CAUSAL, BLOCK_R,
                    BLOCK_Q, BLOCK_N, STAGES,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 32],
        )  # fmt: skip


def hopper_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    rows: int,
    *,
    scale: float,
    sliding_window: int,
    softcap: float,
    causal: bool,
    sinks: torch.Tensor | None,
    tile: HopperTile,
) -> None:
    """Writes ``rows`` rows of out; arguments that paged_attention has checked."""
    kv = kv_shape(k_cache, q.shape[1])
    num_reqs = slots.shape[0]
    page = min(kv.block_size, tile.block_n)
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def boxes(cache: torch.Tensor) -> TensorDescriptor:
        cache_rows = cache.numel() // kv.head_dim
        return TensorDescriptor(
            cache, [cache_rows, kv.head_dim], [kv.head_dim, 1], [page, HALF.value], layout
        )

    # Rounding up costs at most one tile a request.
    tiles = rows // (tile.warpgroups * ROWS.value // kv.group) + num_reqs
    programs = min(tiles * kv.num_kv_heads, num_sms(q.device))
    hopper_prefill_kernel[(programs,)](
        q,
        boxes(k_cache),
        boxes(v_cache),
        block_table,
        block_table.stride(0),
        slots,
        seq_lens,
        query_start_loc,
        out,
        q if sinks is None else sinks,
        scale * LOG2E.value,
        softcap,
        num_reqs,
        SINKS=sinks is not None,
        SOFTCAP=softcap > 0,
        NUM_KV_HEADS=kv.num_kv_heads,
        GROUP=kv.group,
        HEAD_DIM=kv.head_dim,
        BLOCK_SIZE=kv.block_size,
        WINDOW=sliding_window,
        CAUSAL=causal,
        BLOCK_R=block_r(num_reqs),
        WARPGROUPS=tile.warpgroups,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        REGISTERS=tile.registers,
        num_warps=4,
        **pdl_options(),
    )
