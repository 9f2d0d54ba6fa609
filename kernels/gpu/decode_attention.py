"""Split-KV attention of requests with one query each, from rotated queries or from the projection.

A request's keys are cut into chunks, one program each for every KV head. The chunk size is computed
on the device such that all requests together give about ``target_programs`` programs: one long
request among short ones is cut finer instead of being waited for. The last program to finish, of a
request and KV head, combines the chunks in order. The grid does not depend on lengths.

With ``ROT`` the kernel begins with the QKV projection: each program norms and rotates its own
queries, and the one of a request's last chunk does so with the newest key, stores it and its value,
and starts its softmax from them. So chunks count cached keys alone, which are older than the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, counters, next_power_of_2, num_sms, pdl_options
from .online_softmax import attend, empty_softmax, lean, normalized, to_log2_scores, with_sink
from .paged_kv import (
    PagedKV,
    block_r,
    cache_row,
    cache_scale,
    find_request,
    from_bytes,
    kv_shape,
    load_keys_and_values,
    row_scales,
    to_bytes,
)
from .rope import load_rotated, load_rotation
from .shared_attention import SharedSums, shared_rows

# Programs per multiprocessor: each holds about 50 KB of keys and values in flight. More are slower
# in whole steps of many requests (bench/NOTES.md, "Steps on one H100").
DECODE_PROGRAMS_PER_SM = 3
# Few requests are bound by latency: fewer programs start and end sooner.
FEW_DECODES = 4
FEW_DECODES_PROGRAMS_PER_SM = 2
# Below this a chunk's fixed costs (query, combination) outweigh its keys.
MIN_CHUNK = 64


class DecodePlan(NamedTuple):
    """The cut of decode_kernel's work, constants of the kernel."""

    block_n: int  # keys at a time
    block_g: int  # a power of two that holds a KV head's query heads
    block_r: int  # lanes of find_request
    prefetch: bool  # the first keys are loaded before the preceding kernel is waited for
    min_chunk: int
    chunk_step: int  # chunks are multiples of it
    round_up: bool  # a request's number of chunks; else to the nearest


@triton.jit
def cut_into_chunks(lens, known, target_programs, KV: tl.constexpr, PLAN: tl.constexpr):
    """(number of chunks, keys of a chunk) [BLOCK_R] of each request."""
    even_share = tl.cdiv(tl.sum(lens, 0) * KV.num_kv_heads, target_programs)
    # An empty (padding) request still has a unit, which writes its zeros.
    share = tl.maximum(even_share, PLAN.min_chunk)
    if PLAN.round_up:
        pieces = tl.maximum(tl.cdiv(lens, share), 1)
    else:
        pieces = tl.maximum((lens + share // 2) // share, 1)
    steps = tl.maximum(tl.cdiv(tl.cdiv(lens, pieces), PLAN.chunk_step), 1)
    chunks = steps * PLAN.chunk_step
    counts = tl.where(known, tl.maximum(tl.cdiv(lens, chunks), 1), 0)
    return counts, chunks


@triton.jit
def attend_newest(
    acc,  # [BLOCK_G, BLOCK_D], zero
    query,  # [BLOCK_G, BLOCK_D]
    key_at,  # the newest token's key of this head in the projection
    kv,  # PagedKV
    kv_head,
    newest,  # its slot mapping; -1: not stored
    cos,
    sin,
    partner,
    k_norm,
    eps,
    weight_offset,
    scale,
    softcap,
    KV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Stores the newest key and value; returns the softmax's state after them alone."""
    # A name for it: Triton 3.6 takes no attribute inside a shape.
    BLOCK_D: tl.constexpr = KV.block_d
    d = tl.arange(0, BLOCK_D)
    in_head = d < KV.head_dim
    key = load_rotated(
        key_at, d[None, :], partner[None, :], in_head[None, :],
        cos, sin, k_norm, partner, eps, weight_offset, KV.head_dim, BLOCK_D,
    )  # fmt: skip
    value_at = key_at + KV.num_kv_heads * KV.head_dim
    value = tl.load(value_at + d[None, :], mask=in_head[None, :], other=0.0)
    block = newest // KV.block_size
    offset = newest % KV.block_size
    to_cache = cache_row(block, offset, kv_head, KV) + d[None, :]
    # Compared as a tile: the interpreter's masks cannot be joined with a scalar.
    stored = in_head[None, :] & (tl.zeros([1, BLOCK_D], dtype=tl.int64) <= newest)
    if KV.largest > 0:
        key = tl.where(in_head[None, :], key, 0.0)
        value = value.to(tl.float32)
        k_scale, v_scale = row_scales(key, KV.largest), row_scales(value, KV.largest)
        key = to_bytes(key, k_scale, KV.largest, kv.k_cache.dtype.element_ty)
        value = to_bytes(value, v_scale, KV.largest, kv.v_cache.dtype.element_ty)
        at = cache_scale(block, offset, kv_head, KV) + tl.arange(0, 1)
        is_stored = tl.zeros([1], dtype=tl.int64) <= newest
        tl.store(kv.k_cache.to(tl.pointer_type(tl.float32)) + at, k_scale, mask=is_stored)
        tl.store(kv.v_cache.to(tl.pointer_type(tl.float32)) + at, v_scale, mask=is_stored)
    else:
        key = key.to(kv.k_cache.dtype.element_ty)
        value = value.to(kv.v_cache.dtype.element_ty)
    tl.store(kv.k_cache + to_cache, key, mask=stored)
    tl.store(kv.v_cache + to_cache, value, mask=stored)
    # As a later step will read them from the cache.
    if KV.largest > 0:
        key = from_bytes(key, k_scale[:, None], query.dtype)
        value = from_bytes(value, v_scale[:, None], query.dtype)
    key = key.to(query.dtype).to(tl.float32)
    scores = tl.sum(query.to(tl.float32) * key, 1)
    row_max = to_log2_scores(scores, scale, softcap)
    row_sum = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
    acc += value.to(query.dtype).to(tl.float32)
    return acc, row_max, row_sum


@triton.jit
def attend_keys(
    acc,
    row_max,
    row_sum,
    query,
    keys,
    values,
    valid,  # [BLOCK_N], at least one of them
    distance,  # [BLOCK_N], from the query, at most 0
    scale,
    softcap,
    slopes,
    head,  # [BLOCK_G]
    in_group,  # [BLOCK_G]
):
    """One step of the online softmax."""
    scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
    scores = to_log2_scores(scores, scale, softcap)
    scores = lean(scores, slopes, head, in_group, distance[None, :])
    scores = tl.where(valid[None, :], scores, float("-inf"))
    return attend(acc, row_max, row_sum, query, scores, values, False, "ieee")


@triton.jit
def partial_rows(partial, unit, tile, g, KV: tl.constexpr):
    """Pointers to a program's partial acc, row_max and row_sum."""
    programs = tl.num_programs(0).to(tl.int64)
    at = unit.to(tl.int64)
    maxima = partial + programs * (KV.group * KV.head_dim)
    sums = partial + programs * (KV.group * (KV.head_dim + 1))
    return (
        partial + at * (KV.group * KV.head_dim) + tile,
        maxima + at * KV.group + g,
        (sums + at * KV.group + g),
    )


@triton.jit
def combine_chunks(
    partial,
    first,  # the request's first unit
    num_chunks,
    kv_head,
    tile,
    in_tile,
    g,
    KV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(acc, row_max, row_sum) of all of a request's chunks, in order."""
    in_group = g < KV.group
    acc, row_max, row_sum = empty_softmax(BLOCK_G, KV.block_d)
    for c in tl.range(0, num_chunks, num_stages=4):
        there = (first + c) * KV.num_kv_heads + kv_head
        acc_at, max_at, sum_at = partial_rows(partial, there, tile, g, KV)
        part_max = tl.load(max_at, mask=in_group, other=0.0, cache_modifier=".cg")
        part_sum = tl.load(sum_at, mask=in_group, other=0.0, cache_modifier=".cg")
        part = tl.load(acc_at, mask=in_tile, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, part_max)
        alpha = tl.exp2(row_max - new_max)
        beta = tl.exp2(part_max - new_max)
        row_sum = row_sum * alpha + part_sum * beta
        acc = acc * alpha[:, None] + part * beta[:, None]
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def with_shared(acc, row_max, row_sum, shared, request, num_reqs, head, in_group, KV: tl.constexpr):
    """The state with the sums of the tokens that the request's group shares."""
    d = tl.arange(0, KV.block_d)
    if tl.load(shared.tokens + request) > 0:
        count = tl.load(shared.splits + request)
        for split in range(count):
            row = request.to(tl.int64) * (KV.num_kv_heads * KV.group) + head
            acc_at, max_at, sum_at = shared_rows(
                shared.partial, split, shared.num_splits, num_reqs, row, d, KV
            )
            in_tile = in_group[:, None] & (d[None, :] < KV.head_dim)
            part_max = tl.load(max_at, mask=in_group, other=0.0)
            part_sum = tl.load(sum_at, mask=in_group, other=0.0)
            part = tl.load(acc_at, mask=in_tile, other=0.0)
            new_max = tl.maximum(row_max, part_max)
            alpha = tl.exp2(row_max - new_max)
            beta = tl.exp2(part_max - new_max)
            row_sum = row_sum * alpha + part_sum * beta
            acc = acc * alpha[:, None] + part * beta[:, None]
            row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_reqs", "target_programs"])
def decode_kernel(
    q,  # [R, Hq, Dh]; with ROT the projection [R, (Hq + 2 Hkv) * Dh]
    kv,  # PagedKV
    slots,  # [R]
    seq_lens,  # [R]
    out,  # [R, Hq, Dh]
    partial,  # [programs * GROUP * (Dh + 2)] float32: acc, row_max and row_sum of each program
    counters,  # [R * Hkv] int32, zero
    cos_sin,  # with ROT, as those below: [max_pos, ROT] float32
    slot_mapping,  # [R]; -1: not stored
    q_norm,  # [Dh]; None: queries are not normed
    k_norm,  # [Dh]; None: keys are not normed
    eps,
    weight_offset,
    scale,
    softcap,  # None: none
    sinks,  # [Hq] float32; None: none
    slopes,  # [Hq] float32; None: none
    shared,  # SharedSums of the groups' leading tokens; None: each request attends alone
    num_reqs,
    target_programs,
    KV: tl.constexpr,  # KVShape
    PLAN: tl.constexpr,  # DecodePlan
    WINDOW: tl.constexpr,  # 0: none
    ROT: tl.constexpr,  # elements of a head that turn; 0: q is rotated, the newest keys are stored
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = pid % KV.num_kv_heads
    unit = pid // KV.num_kv_heads
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # A step's first inputs are there already: only the newest tokens' rows are waited for.
    reqs = tl.arange(0, PLAN.block_r)
    known = reqs < num_reqs
    lens = tl.load(seq_lens + reqs, mask=known, other=0)
    if WINDOW > 0:
        lens = tl.minimum(lens, WINDOW)
    if ROT > 0:
        lens = tl.maximum(lens - 1, 0)
    if shared is not None:
        lens -= tl.load(shared.tokens + reqs, mask=known, other=0)
    counts, chunks = cut_into_chunks(lens, known, target_programs, KV, PLAN)
    request, first, num_chunks = find_request(counts, unit, PLAN.block_r)
    if request >= num_reqs:
        return
    chunk = tl.sum(tl.where(reqs == request, chunks, 0), 0)

    slot = tl.load(slots + request).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    table = kv.block_table + slot * kv.table_stride
    begin = (unit - first) * chunk
    if WINDOW > 0:
        begin += tl.maximum(seq_len - WINDOW, 0)
    if shared is not None:
        begin += tl.load(shared.tokens + request)
    end = tl.minimum(begin + chunk, seq_len)

    g = tl.arange(0, PLAN.block_g)
    d = tl.arange(0, KV.block_d)
    n = tl.arange(0, PLAN.block_n)
    in_group = g < KV.group
    head = kv_head * KV.group + g
    in_tile = (g[:, None] < KV.group) & (d < KV.head_dim)[None, :]
    tile = g[:, None] * KV.head_dim + d[None, :]
    group = (request * KV.num_kv_heads + kv_head).to(tl.int64) * (KV.group * KV.head_dim)
    if ROT > 0:
        end = tl.minimum(begin + chunk, seq_len - 1)
        turned = tl.maximum(seq_len - 1, 0)
        partner, cos, sin = load_rotation(cos_sin, turned, d, ROT, INTERLEAVED)
        newest = tl.load(slot_mapping + request).to(tl.int64)
    if PLAN.prefetch:
        position = begin + n
        first_valid = position < end
        first_keys, first_values = load_keys_and_values(
            kv, table, kv_head, position, first_valid, KV, q.dtype.element_ty
        )
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc, row_max, row_sum = empty_softmax(PLAN.block_g, KV.block_d)
    if ROT > 0:
        row = q + request.to(tl.int64) * ((KV.group + 2) * KV.num_kv_heads * KV.head_dim)
        query = load_rotated(
            row + kv_head * (KV.group * KV.head_dim), tile,
            g[:, None] * KV.head_dim + partner[None, :], in_tile,
            cos, sin, q_norm, partner, eps, weight_offset, KV.head_dim, KV.block_d,
        ).to(q.dtype.element_ty)  # fmt: skip
        if (unit - first == num_chunks - 1) & (seq_len > 0):
            acc, row_max, row_sum = attend_newest(
                acc, query, row + (KV.group * KV.num_kv_heads + kv_head) * KV.head_dim,
                kv, kv_head, newest, cos, sin, partner, k_norm, eps, weight_offset,
                scale, softcap, KV, PLAN.block_g,
            )  # fmt: skip
    else:
        query = tl.load(q + group + tile, mask=in_tile, other=0.0)

    if PLAN.prefetch:
        if begin < end:
            acc, row_max, row_sum = attend_keys(
                acc, row_max, row_sum, query, first_keys, first_values, first_valid,
                position - (seq_len - 1), scale, softcap, slopes, head, in_group,
            )  # fmt: skip
        begin += PLAN.block_n
    for start in range(begin, end, PLAN.block_n):
        position = start + n
        valid = position < end
        keys, values = load_keys_and_values(
            kv, table, kv_head, position, valid, KV, q.dtype.element_ty
        )
        acc, row_max, row_sum = attend_keys(
            acc, row_max, row_sum, query, keys, values, valid,
            position - (seq_len - 1), scale, softcap, slopes, head, in_group,
        )  # fmt: skip

    out_at = out + group + tile
    if num_chunks == 1:
        if shared is not None:
            acc, row_max, row_sum = with_shared(
                acc, row_max, row_sum, shared, request, num_reqs, head, in_group, KV
            )
        row_sum = with_sink(row_max, row_sum, sinks, head, in_group)
        tl.store(out_at, normalized(acc, row_sum).to(out.dtype.element_ty), mask=in_tile)
    else:
        acc_at, max_at, sum_at = partial_rows(partial, pid, tile, g, KV)
        tl.store(acc_at, acc, mask=in_tile)
        tl.store(max_at, row_max, mask=g < KV.group)
        tl.store(sum_at, row_sum, mask=g < KV.group)
        # All threads' stores come before the count; the count orders them for the last arriver.
        tl.debug_barrier()
        counter = counters + request * KV.num_kv_heads + kv_head
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == num_chunks - 1:
            acc, row_max, row_sum = combine_chunks(
                partial, first, num_chunks, kv_head, tile, in_tile, g, KV, PLAN.block_g
            )
            if shared is not None:
                acc, row_max, row_sum = with_shared(
                    acc, row_max, row_sum, shared, request, num_reqs, head, in_group, KV
                )
            row_sum = with_sink(row_max, row_sum, sinks, head, in_group)
            tl.store(out_at, normalized(acc, row_sum).to(out.dtype.element_ty), mask=in_tile)
            tl.store(counter, 0)


def plan_decode(
    num_decodes: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, prefetch: bool
) -> tuple[int, int, int]:
    """(keys at a time, warps, stages), by whole steps on an H100 (bench/NOTES.md)."""
    if dtype == torch.float32:
        return 16, 4, 2
    if head_dim > 128:
        # The block table's load halves the depth: 5 stages keep 2 of keys and values in flight.
        return 32, 4, 5
    if prefetch:
        # The first keys and values are held in registers; with few heads a program takes more keys.
        if head_dim > 64:
            return 64, 4, 3
        return (256, 8, 2) if num_kv_heads <= 4 else (128, 4, 2)
    if num_decodes <= FEW_DECODES and head_dim > 64:
        return 64, 4, 3
    return (64, 4, 2) if head_dim > 64 else (128, 4, 3)


class Rotation(NamedTuple):
    """Arguments of decode_kernel that rotate the projection; ``cos_sin`` None: q is rotated."""

    cos_sin: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0
    weight_offset: float = 0.0
    interleaved: bool = False


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    sliding_window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    shared: SharedSums | None = None,
    config: tuple[int, int, int] | None = None,
    rotation: Rotation | None = None,
) -> None:
    """Writes the first R rows of out [T, Hq * Dh]; arguments that paged_attention has checked.

    R = number of slots. ``shared``: of tokens that are attended to already. ``rotation``: q is the
    projection, and is rotated with this.
    """
    num_decodes = slots.shape[0]
    kv = kv_shape(k_cache, out.shape[1] // k_cache.shape[3])
    few = num_decodes <= FEW_DECODES
    prefetch = few and rotation is not None
    # Chunks of the even share give `target` programs, rounding up one more a request and head.
    per_sm = FEW_DECODES_PROGRAMS_PER_SM if few else DECODE_PROGRAMS_PER_SM
    target = per_sm * num_sms(q.device)
    programs = target + num_decodes * kv.num_kv_heads
    programs = cdiv(programs, kv.num_kv_heads) * kv.num_kv_heads
    size = programs * kv.group * (kv.head_dim + 2)
    block_n, num_warps, num_stages = config or plan_decode(
        num_decodes, kv.num_kv_heads, kv.head_dim, q.dtype, prefetch
    )
    plan = DecodePlan(
        block_n=block_n,
        block_g=max(next_power_of_2(kv.group), 16),
        block_r=block_r(num_decodes),
        prefetch=prefetch,
        min_chunk=max(MIN_CHUNK, block_n) if prefetch else MIN_CHUNK,
        chunk_step=block_n if rotation is None or prefetch else min(block_n, MIN_CHUNK),
        round_up=rotation is None or few,
    )
    turn = rotation or Rotation()
    decode_kernel[(programs,)](
        q,
        PagedKV(k_cache, v_cache, block_table, block_table.stride(0)),
        slots,
        seq_lens,
        out,
        torch.empty(size, dtype=torch.float32, device=q.device),
        counters(q.device, num_decodes * kv.num_kv_heads),
        *turn[:-1],
        scale,
        softcap if softcap > 0 else None,
        sinks,
        slopes,
        shared,
        num_decodes,
        target,
        KV=kv,
        PLAN=plan,
        WINDOW=sliding_window,
        ROT=0 if turn.cos_sin is None else turn.cos_sin.shape[1],
        INTERLEAVED=turn.interleaved,
        num_warps=num_warps,
        num_stages=num_stages,
        **pdl_options(),
    )
