"""paged_attention: split-KV decode and varlen prefill over the block table.

No grid depends on a length, so both kernels can be captured into CUDA graphs; each program finds
its request from the lengths in memory (``find_request``).

- Decode: a request's keys are cut into chunks, one program each for every KV head. The chunk size
  is computed on the device such that all requests together give about ``target_programs``
  programs: one long request among short ones is cut finer instead of being waited for. The last
  arriver of a (request, KV head) combines its chunks in order.
- Prefill: a program takes a tile of consecutive query tokens times the query heads of one KV head.
  It takes any query length, decodes too, which is how mixed batches are captured.
"""

from __future__ import annotations

from typing import NamedTuple

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

# Programs wanted a multiprocessor: a decode program holds about 50 KB of keys and values in flight.
# Four take 5% more of a step of 64 requests of a 1B model, 2% of an 8B one.
DECODE_PROGRAMS_PER_SM = 3
# Few requests are bound by latency: fewer programs start and end sooner.
FEW_DECODES = 4
FEW_DECODES_PROGRAMS_PER_SM = 2
# Below this a chunk's fixed costs (query, combination) outweigh its keys.
MIN_CHUNK = 64


class PrefillConfig(NamedTuple):
    """Tile of prefill_kernel: query rows (tokens x heads of a group), keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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


@triton.jit(
    do_not_specialize=["num_reqs", "target_programs"],
    do_not_specialize_on_alignment=["partial_max", "partial_sum"],
)
def decode_kernel(
    q,  # [R, Hq, Dh]
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
    MIN_CHUNK: tl.constexpr,
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

    # What a step begins with is there already: only q and the newest keys are waited for.
    reqs = tl.arange(0, BLOCK_R)
    known = reqs < num_reqs
    lens = tl.load(seq_lens + reqs, mask=known, other=0)
    if WINDOW > 0:
        lens = tl.minimum(lens, WINDOW)
    even_share = tl.cdiv(tl.sum(lens, 0) * NUM_KV_HEADS, target_programs)
    # An empty (padding) request still has a unit, which writes its zeros.
    pieces = tl.maximum(tl.cdiv(lens, tl.maximum(even_share, MIN_CHUNK)), 1)
    chunks = tl.maximum(tl.cdiv(tl.cdiv(lens, pieces), BLOCK_N), 1) * BLOCK_N
    counts = tl.where(known, tl.maximum(tl.cdiv(lens, chunks), 1), 0)
    request, first, num_chunks = find_request(counts, unit, BLOCK_R)
    if request >= num_reqs:
        return
    chunk = tl.sum(tl.where(reqs == request, chunks, 0), 0)

    slot = tl.load(slots + request).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    begin = (unit - first) * chunk
    if WINDOW > 0:
        begin += tl.maximum(seq_len - WINDOW, 0)
    end = tl.minimum(begin + chunk, seq_len)
    if PDL:
        tl.extra.cuda.gdc_wait()

    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_tile = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    tile = g[:, None] * HEAD_DIM + d[None, :]
    q_base = (request * NUM_KV_HEADS + kv_head).to(tl.int64) * (GROUP * HEAD_DIM)
    query = tl.load(q + q_base + tile, mask=in_tile, other=0.0)

    row_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        valid = position < end
        block = tl.load(
            block_table + slot * table_stride + position // BLOCK_SIZE, mask=valid, other=0
        ).to(tl.int64)
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
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
        scores = to_log2_scores(scores, scale, softcap, HAS_SOFTCAP)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        # Each step has a valid key, so the maximum is finite.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(
            p.to(query.dtype), values.to(query.dtype), acc * alpha[:, None], input_precision="ieee"
        )
        row_max = new_max

    if num_chunks == 1:
        acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
        tl.store(out + q_base + tile, acc.to(out.dtype.element_ty), mask=in_tile)
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
            tl.store(out + q_base + tile, acc.to(out.dtype.element_ty), mask=in_tile)
            tl.store(counter, 0)


@triton.jit
def prefill_steps(
    acc,  # [BLOCK_M, BLOCK_D]
    row_max,  # [BLOCK_M]
    row_sum,
    query,  # [BLOCK_M, BLOCK_D]
    q_position,  # [BLOCK_M]
    k_cache,
    v_cache,
    table,  # the request's row of the block table
    kv_head,
    begin,
    end,
    seq_len,
    scale,
    softcap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,  # False: every query of the tile sees every key of [begin, end)
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The online softmax over keys [begin, end), BLOCK_N at a time."""
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        if MASKED:
            valid = position < seq_len
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
        else:
            block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
            row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            k_at = k_cache + row[None, :] * HEAD_DIM + d[:, None]
            v_at = v_cache + row[:, None] * HEAD_DIM + d[None, :]
            if HEAD_DIM == BLOCK_D:
                keys = tl.load(k_at)
                values = tl.load(v_at)
            else:
                keys = tl.load(k_at, mask=d[:, None] < HEAD_DIM, other=0.0)
                values = tl.load(v_at, mask=d[None, :] < HEAD_DIM, other=0.0)
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee")
        scores = to_log2_scores(scores, scale, softcap, HAS_SOFTCAP)
        if MASKED:
            seen = valid[None, :]
            if CAUSAL:
                seen = seen & (position[None, :] <= q_position[:, None])
            if WINDOW > 0:
                seen = seen & (q_position[:, None] - position[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row may see no key yet: subtract 0 then, so that exp2(-inf) gives 0 and not NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(
            p.to(query.dtype), values.to(query.dtype), acc * alpha[:, None], input_precision="ieee"
        )
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["num_reqs"],
    # Views that begin behind the decodes.
    do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"],
)
def prefill_kernel(
    q,  # [T, Hq, Dh]
    k_cache,  # [num_blocks, Hkv, BLOCK_SIZE, Dh]
    v_cache,
    block_table,  # [slots, max_blocks]
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, Hq, Dh]
    scale,
    softcap,
    table_stride,
    num_reqs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP  # query tokens of a tile
    # Later tiles see more keys and start first: the short ones fill the gaps at the end.
    unit = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    reqs = tl.arange(0, BLOCK_R)
    known = reqs < num_reqs
    starts = tl.load(query_start_loc + reqs, mask=known, other=0)
    ends = tl.load(query_start_loc + reqs + 1, mask=known, other=0)
    request, first, _ = find_request(tl.cdiv(ends - starts, BLOCK_Q), unit, BLOCK_R)
    if request >= num_reqs:
        return

    slot = tl.load(slots + request).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    q_begin = (unit - first) * BLOCK_Q
    context = seq_len - q_len
    if PDL:
        tl.extra.cuda.gdc_wait()

    # Row i of the tile is query token q_begin + i // GROUP, head i % GROUP of the group.
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = q_begin + i // GROUP
    in_rows = (i < BLOCK_Q * GROUP) & (token < q_len)
    head = kv_head * GROUP + i % GROUP
    rows = (q_start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
    offsets = rows[:, None] * HEAD_DIM + d[None, :]
    mask = in_rows[:, None] & (d[None, :] < HEAD_DIM)
    query = tl.load(q + offsets, mask=mask, other=0.0)
    q_position = context + token

    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    table = block_table + slot * table_stride
    last = context + tl.minimum(q_begin + BLOCK_Q, q_len)  # one past the last query's position
    if CAUSAL:
        end = tl.minimum(last, seq_len)
        # Keys up to the first query's position are seen by every query of the tile.
        all_seen = (context + q_begin + 1) // BLOCK_N * BLOCK_N
    else:
        end = seq_len
        all_seen = seq_len // BLOCK_N * BLOCK_N
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context + q_begin - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        all_seen = begin
    if WINDOW == 0:
        acc, row_max, row_sum = prefill_steps(
            acc, row_max, row_sum, query, q_position, k_cache, v_cache, table, kv_head,
            begin, all_seen, seq_len, scale, softcap,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, CAUSAL, False,
            BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, row_max, row_sum = prefill_steps(
        acc, row_max, row_sum, query, q_position, k_cache, v_cache, table, kv_head,
        all_seen, end, seq_len, scale, softcap,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, CAUSAL, True,
        BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


def _block_r(num_reqs: int) -> int:
    """Lanes of find_request: few sizes, so that few kernels are compiled."""
    for size in (16, 256):
        if num_reqs <= size:
            return size
    return next_power_of_2(num_reqs)


def plan_decode(num_decodes: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(keys a step, warps, stages), as measured inside whole steps on an H100."""
    if dtype == torch.float32:
        return 16, 4, 2
    if head_dim > 128:
        # The block table's load halves the depth: 5 stages keep 2 of keys and values in flight.
        return 32, 4, 5
    if num_decodes <= FEW_DECODES and head_dim > 64:
        return 64, 4, 3
    return (64, 4, 2) if head_dim > 64 else (128, 4, 3)


def plan_prefill(rows: int, group: int, head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """The tile for ``rows`` query tokens of ``group`` heads each."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        return PrefillConfig(max(32, least), 16, 4, 2)
    if head_dim > 128:
        return PrefillConfig(max(64, least), 32, 4, 2)
    if rows * group <= 64:
        return PrefillConfig(max(16, next_power_of_2(rows * group), least), 64, 4, 3)
    if rows <= 512:
        # Few tokens: smaller tiles make more programs.
        return PrefillConfig(max(64, least), 64, 4, 3)
    return PrefillConfig(max(128, least), 64, 8, 3)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    decode_config: tuple[int, int, int] | None = None,
    prefill_config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Attention of each request's queries over its cached keys and values.

    The keys of the queries themselves are in the cache already. Rows of q that belong to no
    request are left unwritten. The int32 tensors were complete before the kernel that precedes
    this one began: they are read without waiting for it.

    Args:
        q: [T, Hq, Dh]; request r's rows are query_start_loc[r] .. query_start_loc[r + 1], at
            positions seq_lens[r] - its number of rows ...
        k_cache, v_cache: [num_blocks, Hkv, block_size, Dh], any float type.
        block_table: [max slots, max blocks] int32; request r's row is slots[r].
        slots, seq_lens: [R] int32. query_start_loc: [R + 1] int32, starting with 0.
        num_decodes: the first num_decodes requests have one query each, and it sees every key.
        max_query_len, max_seq_len: bounds, for other implementations; no grid depends on them.
        sliding_window: a query sees this many last keys, itself included; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: not.
        decode_config, prefill_config: tiles, where a bench overrides the tables.

    Returns:
        [T, Hq * Dh].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        slots=slots,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
    )
    rows, num_heads, head_dim = q.shape
    num_reqs = slots.shape[0]
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, num_blocks, num_kv_heads, block_size, head_dim)
    check_shape("seq_lens", seq_lens, num_reqs)
    check_shape("query_start_loc", query_start_loc, num_reqs + 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    if not 0 <= num_decodes <= min(num_reqs, rows):
        raise ValueError(f"num_decodes {num_decodes}: there are {num_reqs} requests, {rows} rows")
    group = num_heads // num_kv_heads
    out = torch.empty((rows, num_heads * head_dim), dtype=q.dtype, device=q.device)
    shared = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": sliding_window,
        "HAS_SOFTCAP": softcap > 0,
        "BLOCK_D": max(next_power_of_2(head_dim), 16),
        **pdl_options(),
    }
    if num_decodes:
        # Chunks of the even share give `target` programs, rounding up one more a request and head.
        few = num_decodes <= FEW_DECODES
        per_sm = FEW_DECODES_PROGRAMS_PER_SM if few else DECODE_PROGRAMS_PER_SM
        target = per_sm * num_sms(q.device)
        programs = target + num_decodes * num_kv_heads
        programs = cdiv(programs, num_kv_heads) * num_kv_heads
        partial = torch.empty(
            programs * group * (head_dim + 2), dtype=torch.float32, device=q.device
        )
        block_n, num_warps, num_stages = decode_config or plan_decode(
            num_decodes, head_dim, q.dtype
        )
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
            scale,
            softcap,
            block_table.stride(0),
            num_decodes,
            target,
            MIN_CHUNK=MIN_CHUNK,
            BLOCK_R=_block_r(num_decodes),
            BLOCK_G=max(next_power_of_2(group), 16),
            BLOCK_N=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            **shared,
        )
    if num_decodes < num_reqs:
        config = prefill_config or plan_prefill(rows - num_decodes, group, head_dim, q.dtype)
        block_q = config.block_m // group
        rest = num_reqs - num_decodes
        # Rounding up costs at most one tile a request.
        tiles = (rows - num_decodes) // block_q + rest
        prefill_kernel[(num_kv_heads, tiles)](
            q,
            k_cache,
            v_cache,
            block_table,
            slots[num_decodes:],
            seq_lens[num_decodes:],
            query_start_loc[num_decodes:],
            out,
            scale,
            softcap,
            block_table.stride(0),
            rest,
            CAUSAL=causal,
            BLOCK_R=_block_r(rest),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shared,
        )
    return out
