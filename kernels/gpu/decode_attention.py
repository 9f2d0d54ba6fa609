"""Split-KV attention of requests with one query each, from rotated queries or from the projection.

A request's keys are cut into chunks, one program each for every KV head. The chunk size is computed
on the device such that all requests together give about ``target_programs`` programs: one long
request among short ones is cut finer instead of being waited for. The last arriver of a (request,
KV head) combines its chunks in order. The grid does not depend on lengths.

``rope_decode_attention`` begins with the QKV projection: each program norms and rotates its own
queries, and the one of a request's last chunk does so with the newest key, stores it and its value,
and starts its softmax from them. So chunks count cached keys alone, which are older than the step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import (
    cdiv,
    check_shape,
    check_tensors,
    counters,
    next_power_of_2,
    num_sms,
    pdl_options,
)
from .rope import rotation_lanes

# Programs wanted a multiprocessor: a decode program holds about 50 KB of keys and values in flight.
# Four take 5% more of a step of 64 requests of a 1B model, 2% of an 8B one.
DECODE_PROGRAMS_PER_SM = 3
# Few requests are bound by latency: fewer programs start and end sooner.
FEW_DECODES = 4
FEW_DECODES_PROGRAMS_PER_SM = 2
# Below this a chunk's fixed costs (query, combination) outweigh its keys.
MIN_CHUNK = 64


@triton.jit
def find_request(counts, index, BLOCK_R: tl.constexpr):
    """Which request the index-th unit belongs to, counts[r] units each.

    Returns (request, its first unit, its number of units); request >= the number of requests with
    units when there is no such unit.
    """
    reqs = tl.arange(0, BLOCK_R)
    ends = tl.cumsum(counts, 0)
    request = tl.sum((ends <= index).to(tl.int32), 0)
    first = tl.sum(tl.where(reqs < request, counts, 0), 0)
    count = tl.sum(tl.where(reqs == request, counts, 0), 0)
    return request, first, count


@triton.jit
def to_log2_scores(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Dot products -> scores in units of log2(e), capped."""
    if HAS_SOFTCAP:
        # tanh(z) = 1 - 2 / (e^2z + 1)
        z = scores * (scale / softcap)
        return (softcap * 1.4426950408889634) * (
            1.0 - 2.0 / (tl.exp2(z * (2.0 * 1.4426950408889634)) + 1.0)
        )
    else:
        return scores * (scale * 1.4426950408889634)


@triton.jit
def load_keys_and_values(
    k_cache,
    v_cache,
    table,  # the request's row of the block table
    kv_head,
    position,  # [BLOCK_N]
    valid,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D]; zero where not valid."""
    d = tl.arange(0, BLOCK_D)
    block = tl.load(table + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
    keys = tl.load(
        k_cache + row[None, :] * HEAD_DIM + d[:, None],
        mask=valid[None, :] & (d[:, None] < HEAD_DIM),
        other=0.0,
    )
    values = tl.load(
        v_cache + row[:, None] * HEAD_DIM + d[None, :],
        mask=valid[:, None] & (d[None, :] < HEAD_DIM),
        other=0.0,
    )
    return keys, values


@triton.jit
def attend(
    acc,  # [BLOCK_G, BLOCK_D]
    row_max,  # [BLOCK_G]
    row_sum,
    query,
    keys,
    values,
    valid,  # [BLOCK_N], at least one of them
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
):
    """One step of the online softmax."""
    scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
    scores = to_log2_scores(scores, scale, softcap, HAS_SOFTCAP)
    scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(
        p.to(query.dtype), values.to(query.dtype), acc * alpha[:, None], input_precision="ieee"
    )
    return acc, new_max, row_sum


@triton.jit
def load_rotated(
    heads,  # where the first head begins
    offsets,  # [N, BLOCK_D] of the heads' elements
    partners,  # and of what each is rotated with
    mask,
    cos,  # [BLOCK_D]
    sin,  # signed
    norm,  # [Dh]
    partner,  # [BLOCK_D]
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Heads of the projection, normed and rotated, in float32."""
    x = tl.load(heads + offsets, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(heads + partners, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        d = tl.arange(0, BLOCK_D)
        in_head = d < HEAD_DIM
        w = tl.load(norm + d, mask=in_head, other=0.0).to(tl.float32) + weight_offset
        wp = tl.load(norm + partner, mask=in_head, other=0.0).to(tl.float32) + weight_offset
        rstd = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = x * rstd * w[None, :]
        other = other * rstd * wp[None, :]
    return x * cos[None, :] + other * sin[None, :]


@triton.jit(
    do_not_specialize=["num_reqs", "target_programs"],
    do_not_specialize_on_alignment=["partial_max", "partial_sum"],
)
def decode_kernel(
    q,  # [R, Hq, Dh]; with ROT the projection [R, (Hq + 2 Hkv) * Dh]
    k_cache,  # [num_blocks, Hkv, BLOCK_SIZE, Dh]
    v_cache,
    block_table,  # [slots, max_blocks]
    slots,  # [R]
    seq_lens,  # [R]
    out,  # [R, Hq, Dh]
    partial_out,  # [programs, GROUP, Dh] float32
    partial_max,  # [programs, GROUP] float32
    partial_sum,  # [programs, GROUP] float32
    counters,  # [R * Hkv] int32, zero
    cos_sin,  # with ROT, as those below: [max_pos, ROT] float32
    slot_mapping,  # [R]; -1: not stored
    q_norm,  # [Dh]
    k_norm,  # [Dh]
    eps,
    weight_offset,
    scale,
    softcap,
    table_stride,
    num_reqs,
    target_programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SOFTCAP: tl.constexpr,
    ROT: tl.constexpr,  # elements of a head that turn; 0: q is rotated, the newest keys are stored
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PREFETCH: tl.constexpr,  # the first keys are loaded before the predecessor is waited for
    MIN_CHUNK: tl.constexpr,
    ROUND_UP: tl.constexpr,  # a request's number of chunks; else to the nearest
    CHUNK_STEP: tl.constexpr,  # chunks are multiples of it
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    kv_head = pid % NUM_KV_HEADS
    unit = pid // NUM_KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    # What a step begins with is there already: only the newest tokens' rows are waited for.
    reqs = tl.arange(0, BLOCK_R)
    known = reqs < num_reqs
    lens = tl.load(seq_lens + reqs, mask=known, other=0)
    if WINDOW > 0:
        lens = tl.minimum(lens, WINDOW)
    if ROT > 0:
        lens = tl.maximum(lens - 1, 0)
    even_share = tl.cdiv(tl.sum(lens, 0) * NUM_KV_HEADS, target_programs)
    # An empty (padding) request still has a unit, which writes its zeros.
    share = tl.maximum(even_share, MIN_CHUNK)
    if ROUND_UP:
        pieces = tl.maximum(tl.cdiv(lens, share), 1)
    else:
        pieces = tl.maximum((lens + share // 2) // share, 1)
    chunks = tl.maximum(tl.cdiv(tl.cdiv(lens, pieces), CHUNK_STEP), 1) * CHUNK_STEP
    counts = tl.where(known, tl.maximum(tl.cdiv(lens, chunks), 1), 0)
    request, first, num_chunks = find_request(counts, unit, BLOCK_R)
    if request >= num_reqs:
        return
    chunk = tl.sum(tl.where(reqs == request, chunks, 0), 0)

    slot = tl.load(slots + request).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    table = block_table + slot * table_stride
    begin = (unit - first) * chunk
    if WINDOW > 0:
        begin += tl.maximum(seq_len - WINDOW, 0)
    end = tl.minimum(begin + chunk, seq_len)

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_head = d < HEAD_DIM
    in_tile = (g[:, None] < GROUP) & in_head[None, :]
    tile = g[:, None] * HEAD_DIM + d[None, :]
    group = (request * NUM_KV_HEADS + kv_head).to(tl.int64) * (GROUP * HEAD_DIM)
    if ROT > 0:
        end = tl.minimum(begin + chunk, seq_len - 1)
        partner, angle, sign = rotation_lanes(d, ROT, INTERLEAVED)
        turn = cos_sin + tl.maximum(seq_len - 1, 0).to(tl.int64) * ROT + angle
        cos = tl.load(turn, mask=d < ROT, other=1.0)
        sin = tl.load(turn + ROT // 2, mask=d < ROT, other=0.0) * sign
        newest = tl.load(slot_mapping + request).to(tl.int64)
    if PREFETCH:
        position = begin + n
        first_valid = position < end
        first_keys, first_values = load_keys_and_values(
            k_cache, v_cache, table, kv_head, position, first_valid,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()

    row_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    if ROT > 0:
        NUM_ALL: tl.constexpr = (GROUP + 2) * NUM_KV_HEADS
        row = q + request.to(tl.int64) * (NUM_ALL * HEAD_DIM)
        query = load_rotated(
            row + kv_head * (GROUP * HEAD_DIM), tile, g[:, None] * HEAD_DIM + partner[None, :],
            in_tile, cos, sin, q_norm, partner, eps, weight_offset, HEAD_DIM, BLOCK_D, HAS_Q_NORM,
        ).to(q.dtype.element_ty)  # fmt: skip
        if (unit - first == num_chunks - 1) & (seq_len > 0):
            key_at = row + (GROUP * NUM_KV_HEADS + kv_head) * HEAD_DIM
            key = load_rotated(
                key_at, d[None, :], partner[None, :], in_head[None, :],
                cos, sin, k_norm, partner, eps, weight_offset, HEAD_DIM, BLOCK_D, HAS_K_NORM,
            ).to(k_cache.dtype.element_ty)  # fmt: skip
            value = tl.load(
                key_at + NUM_KV_HEADS * HEAD_DIM + d[None, :], mask=in_head[None, :], other=0.0
            ).to(v_cache.dtype.element_ty)
            to_cache = (
                newest // BLOCK_SIZE * NUM_KV_HEADS + kv_head
            ) * BLOCK_SIZE + newest % BLOCK_SIZE
            to_cache = to_cache * HEAD_DIM + d[None, :]
            # Compared as a tile: the interpreter's masks cannot be joined with a scalar.
            stored = in_head[None, :] & (tl.zeros([1, BLOCK_D], dtype=tl.int64) <= newest)
            tl.store(k_cache + to_cache, key, mask=stored)
            tl.store(v_cache + to_cache, value, mask=stored)
            # What a reader of the cache would compute with.
            key = key.to(query.dtype).to(tl.float32)
            scores = tl.sum(query.to(tl.float32) * key, 1)
            row_max = to_log2_scores(scores, scale, softcap, HAS_SOFTCAP)
            row_sum = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
            acc += value.to(query.dtype).to(tl.float32)
    else:
        query = tl.load(q + group + tile, mask=in_tile, other=0.0)

    if PREFETCH:
        if begin < end:
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, query, first_keys, first_values, first_valid,
                scale, softcap, HAS_SOFTCAP,
            )  # fmt: skip
        begin += BLOCK_N
    for start in range(begin, end, BLOCK_N):
        position = start + n
        valid = position < end
        keys, values = load_keys_and_values(
            k_cache, v_cache, table, kv_head, position, valid,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_D,
        )  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, query, keys, values, valid, scale, softcap, HAS_SOFTCAP
        )

    if num_chunks == 1:
        acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
        tl.store(out + group + tile, acc.to(out.dtype.element_ty), mask=in_tile)
    else:
        here = pid.to(tl.int64)
        in_group = g < GROUP
        tl.store(partial_out + here * (GROUP * HEAD_DIM) + tile, acc, mask=in_tile)
        tl.store(partial_max + here * GROUP + g, row_max, mask=in_group)
        tl.store(partial_sum + here * GROUP + g, row_sum, mask=in_group)
        # All threads' stores come before the count; the count orders them for the last arriver.
        tl.debug_barrier()
        counter = counters + request * NUM_KV_HEADS + kv_head
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == num_chunks - 1:
            row_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
            acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
            for c in tl.range(0, num_chunks, num_stages=4):
                there = ((first + c) * NUM_KV_HEADS + kv_head).to(tl.int64)
                part_max = tl.load(
                    partial_max + there * GROUP + g,
                    mask=in_group,
                    other=0.0,
                    cache_modifier=".cg",
                )
                part_sum = tl.load(
                    partial_sum + there * GROUP + g,
                    mask=in_group,
                    other=0.0,
                    cache_modifier=".cg",
                )
                part = tl.load(
                    partial_out + there * (GROUP * HEAD_DIM) + tile,
                    mask=in_tile,
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_max = tl.maximum(row_max, part_max)
                alpha = tl.exp2(row_max - new_max)
                beta = tl.exp2(part_max - new_max)
                row_sum = row_sum * alpha + part_sum * beta
                acc = acc * alpha[:, None] + part * beta[:, None]
                row_max = new_max
            acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
            tl.store(out + group + tile, acc.to(out.dtype.element_ty), mask=in_tile)
            tl.store(counter, 0)


def block_r(num_reqs: int) -> int:
    """Lanes of find_request: few sizes, so that few kernels are compiled."""
    for size in (16, 256):
        if num_reqs <= size:
            return size
    return next_power_of_2(num_reqs)


def plan_decode(
    num_decodes: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, prefetch: bool
) -> tuple[int, int, int]:
    """(keys a step, warps, stages), as measured inside whole steps on an H100."""
    if dtype == torch.float32:
        return 16, 4, 2
    if head_dim > 128:
        # The block table's load halves the depth: 5 stages keep 2 of keys and values in flight.
        return 32, 4, 5
    if prefetch:
        # The first keys and values are held in registers; few heads want one program for more.
        if head_dim > 64:
            return 64, 4, 3
        return (256, 8, 2) if num_kv_heads <= 4 else (128, 4, 2)
    if num_decodes <= FEW_DECODES and head_dim > 64:
        return 64, 4, 3
    return (64, 4, 2) if head_dim > 64 else (128, 4, 3)


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
    config: tuple[int, int, int] | None = None,
    rope: dict[str, Any] | None = None,
) -> None:
    """Writes the first R rows of out [T, Hq * Dh]; arguments that paged_attention has checked.

    R = number of slots. ``rope``: what the kernel rotates with, where q is the projection.
    """
    num_decodes = slots.shape[0]
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    group = out.shape[1] // head_dim // num_kv_heads
    few = num_decodes <= FEW_DECODES
    prefetch = few and rope is not None
    # Chunks of the even share give `target` programs, rounding up one more a request and head.
    per_sm = FEW_DECODES_PROGRAMS_PER_SM if few else DECODE_PROGRAMS_PER_SM
    target = per_sm * num_sms(q.device)
    programs = target + num_decodes * num_kv_heads
    programs = cdiv(programs, num_kv_heads) * num_kv_heads
    partial = torch.empty(programs * group * (head_dim + 2), dtype=torch.float32, device=q.device)
    block_n, num_warps, num_stages = config or plan_decode(
        num_decodes, num_kv_heads, head_dim, q.dtype, prefetch
    )
    rotation = rope
    if rotation is None:
        rotation = {"cos_sin": q, "slot_mapping": slots, "q_norm": q, "k_norm": q}
        rotation |= {"eps": 0.0, "weight_offset": 0.0}
        rotation |= {"ROT": 0, "HAS_Q_NORM": False, "HAS_K_NORM": False, "INTERLEAVED": False}
    decode_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        block_table,
        slots,
        seq_lens,
        out,
        partial,
        partial[programs * group * head_dim :],
        partial[programs * group * (head_dim + 1) :],
        counters(q.device, num_decodes * num_kv_heads),
        scale=scale,
        softcap=softcap,
        table_stride=block_table.stride(0),
        num_reqs=num_decodes,
        target_programs=target,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        HAS_SOFTCAP=softcap > 0,
        PREFETCH=prefetch,
        MIN_CHUNK=max(MIN_CHUNK, block_n) if prefetch else MIN_CHUNK,
        ROUND_UP=rope is None or few,
        CHUNK_STEP=block_n if rope is None or prefetch else min(block_n, MIN_CHUNK),
        BLOCK_R=block_r(num_decodes),
        BLOCK_G=max(next_power_of_2(group), 16),
        BLOCK_D=max(next_power_of_2(head_dim), 16),
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        **rotation,
        **pdl_options(),
    )


def max_rope_decodes(head_dim: int) -> int:
    """The most requests for which one kernel is faster than two, as measured on an H100.

    Microseconds a step of two kernels and of one. 1 request: 135M 540 and 496, 1B 1,040 and 1,018,
    8B (heads of 128) 5,332 and 5,392. 64: 1,356 and 1,315, 1,900 and 1,893, 8,396 and 8,388. 256:
    2,546 and 2,580, 3,797 and 3,805.
    """
    return 64 if head_dim <= 64 else 0


def rope_decode_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """qk_norm_rope_store_kv and paged_attention of R requests with one query each, in one kernel.

    A request's token is at position seq_lens[r] - 1, and what is before it was in the cache before
    the step began. The int32 tensors were complete before the kernel that precedes this one began:
    they and those keys and values are read without waiting for it. A request of length 0 is
    padding: its row becomes zeros.

    Args:
        qkv: [R, (num_heads + 2 Hkv) * Dh].
        cos_sin: [max_pos, rot] float32, cos in the first half; rot <= Dh, even.
        slot_mapping: [R] int32, block * block_size + offset; -1: the token is not stored.
        k_cache, v_cache: [num_blocks, Hkv, block_size, Dh].
        block_table: [max slots, max blocks] int32; request r's row is slots[r].
        slots, seq_lens: [R] int32.
        q_norm, k_norm, eps, weight_offset, interleaved: see qk_norm_rope_store_kv.
        scale, sliding_window, softcap: see paged_attention.

    Returns:
        [R, num_heads * Dh].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        qkv=qkv,
        cos_sin=cos_sin,
        slot_mapping=slot_mapping,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        slots=slots,
        seq_lens=seq_lens,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    rows = qkv.shape[0]
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    check_shape("qkv", qkv, rows, (num_heads + 2 * num_kv_heads) * head_dim)
    check_shape("v_cache", v_cache, num_blocks, num_kv_heads, block_size, head_dim)
    for name, tensor in (("slot_mapping", slot_mapping), ("slots", slots), ("seq_lens", seq_lens)):
        check_shape(name, tensor, rows)
    rot = cos_sin.shape[1]
    if rot % 2 or not 0 < rot <= head_dim:
        raise ValueError(f"{rot} rotated values: must be even and at most head_dim {head_dim}")
    out = torch.empty((rows, num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    if rows:
        decode_attention(
            qkv,
            k_cache,
            v_cache,
            block_table,
            slots,
            seq_lens,
            out,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            rope={
                "cos_sin": cos_sin,
                "slot_mapping": slot_mapping,
                "q_norm": qkv if q_norm is None else q_norm,
                "k_norm": qkv if k_norm is None else k_norm,
                "eps": eps,
                "weight_offset": weight_offset,
                "ROT": rot,
                "HAS_Q_NORM": q_norm is not None,
                "HAS_K_NORM": k_norm is not None,
                "INTERLEAVED": interleaved,
            },
        )
    return out
