"""paged_attention: split-KV decode and varlen prefill over the block table.

No grid depends on a length, so both kernels can be captured into CUDA graphs; each program finds
its request from the lengths in memory (``find_request``).

- Decode: ``decode_attention``.
- Prefill: a program takes a tile of consecutive query tokens times the query heads of one KV head.
  It takes any query length, decodes too, which is how mixed batches are captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .decode_attention import block_r, decode_attention, find_request, to_log2_scores
from .launch import check_shape, check_tensors, next_power_of_2, pdl_options

# Matrix units take float32 as sums of two tf32 numbers: an error of 1e-7 in products of 384 terms,
# where plain float32 sums them to 2.5e-7.
FLOAT32_PRECISION = "tf32x3"


class PrefillConfig(NamedTuple):
    """Tile of prefill_kernel: query rows (tokens x heads of a group), keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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
    PRECISION: tl.constexpr,
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
        scores = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION)
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
            p.to(query.dtype),
            values.to(query.dtype),
            acc * alpha[:, None],
            input_precision=PRECISION,
        )
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=["num_reqs"],
    # Views that begin after the decodes.
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
    PRECISION: tl.constexpr,
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
            BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = prefill_steps(
        acc, row_max, row_sum, query, q_position, k_cache, v_cache, table, kv_head,
        all_seen, end, seq_len, scale, softcap,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, CAUSAL, True,
        BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


def plan_prefill(rows: int, group: int, head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """The tile for ``rows`` query tokens of ``group`` heads each."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        # Small tiles: bench/NOTES.md, "float32 products".
        if head_dim <= 64:
            return PrefillConfig(max(64, least), 32, 4, 2)
        return PrefillConfig(max(32, least), 32 if head_dim <= 128 else 16, 4, 2)
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
        decode_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            slots[:num_decodes],
            seq_lens[:num_decodes],
            out,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            config=decode_config,
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
            BLOCK_R=block_r(rest),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PRECISION=FLOAT32_PRECISION if q.dtype == torch.float32 else "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **shared,
        )
    return out
