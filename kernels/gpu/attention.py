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

from ..shared_prefixes import SharedPrefixes
from .decode_attention import decode_attention
from .hopper_plan import has_gluon, plan_hopper
from .launch import check_shape, check_tensors, next_power_of_2, pdl_options
from .online_softmax import empty_softmax, normalized, with_sink
from .paged_kv import (
    PagedKV,
    block_r,
    check_caches,
    find_request,
    kv_shape,
)
from .prefill_steps import prefill_steps
from .shared_attention import shared_attention

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
def keys_to_see(
    context,
    q_begin,
    last,
    seq_len,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(begin, all_seen, end) of a tile's keys: every query sees those before all_seen.

    ``last`` is one past the last query's position.
    """
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
    return begin, all_seen, end


@triton.jit(
    do_not_specialize=["num_reqs"],
    # Views that begin after the decodes.
    do_not_specialize_on_alignment=["slots", "seq_lens", "query_start_loc"],
)
def prefill_kernel(
    q,  # [T, Hq, Dh]
    kv,  # PagedKV
    slots,  # [R]
    seq_lens,  # [R]
    query_start_loc,  # [R + 1]
    out,  # [T, Hq, Dh]
    scale,
    softcap,  # None: none
    sinks,  # [Hq] float32; None: none
    slopes,  # [Hq] float32; None: none
    num_reqs,
    KV: tl.constexpr,  # KVShape
    WINDOW: tl.constexpr,  # 0: none
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // KV.group  # query tokens of a tile
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

    # Row i of the tile is query token q_begin + i // group, head i % group of the group.
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, KV.block_d)
    token = q_begin + i // KV.group
    in_rows = (i < BLOCK_Q * KV.group) & (token < q_len)
    head = kv_head * KV.group + i % KV.group
    rows = (q_start + token).to(tl.int64) * (KV.num_kv_heads * KV.group) + head
    offsets = rows[:, None] * KV.head_dim + d[None, :]
    mask = in_rows[:, None] & (d[None, :] < KV.head_dim)
    query = tl.load(q + offsets, mask=mask, other=0.0)
    q_position = context + token

    acc, row_max, row_sum = empty_softmax(BLOCK_M, KV.block_d)
    table = kv.block_table + slot * kv.table_stride
    last = context + tl.minimum(q_begin + BLOCK_Q, q_len)
    begin, all_seen, end = keys_to_see(context, q_begin, last, seq_len, WINDOW, CAUSAL, BLOCK_N)
    if WINDOW == 0:
        acc, row_max, row_sum = prefill_steps(
            acc, row_max, row_sum, query, q_position, kv, table, kv_head, begin, all_seen, seq_len,
            scale, softcap, slopes, head, in_rows, KV, WINDOW, CAUSAL, False, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = prefill_steps(
        acc, row_max, row_sum, query, q_position, kv, table, kv_head, all_seen, end, seq_len,
        scale, softcap, slopes, head, in_rows, KV, WINDOW, CAUSAL, True, BLOCK_N, PRECISION,
    )  # fmt: skip
    row_sum = with_sink(row_max, row_sum, sinks, head, in_rows)
    tl.store(out + offsets, normalized(acc, row_sum).to(out.dtype.element_ty), mask=mask)


def plan_prefill(rows: int, group: int, head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """The tile for ``rows`` query tokens of ``group`` heads each."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        # Small tiles: bench/NOTES.md, "float32 products".
        if head_dim <= 64:
            return PrefillConfig(max(64, least), 32, 4, 2)
        return PrefillConfig(max(32, least), 32 if head_dim <= 128 else 16, 4, 2)
    if head_dim > 256:
        # Accumulators of more rows do not fit the registers.
        return PrefillConfig(max(32, least), 32, 4, 2)
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
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    shared: SharedPrefixes | None = None,
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
        k_cache, v_cache: [num_blocks, Hkv, block_size, Dh], of ``kv_cache.make_cache``.
        block_table: [max slots, max blocks] int32; request r's row is slots[r].
        slots, seq_lens: [R] int32. query_start_loc: [R + 1] int32, starting with 0.
        num_decodes: the first num_decodes requests have one query each, and it sees every key.
        max_query_len, max_seq_len: bounds, for other implementations; no grid depends on them.
        sliding_window: a query sees this many last keys, itself included; 0: all.
        softcap: scores become softcap * tanh(score / softcap); 0: not.
        sinks: [Hq] float32, a score of every query's softmax that no value belongs to.
        slopes: [Hq] float32; scores fall by a head's slope for each token between query and key.
        shared: which of the first num_decodes requests share leading blocks; a layer with a sliding
            window attends to each request alone.
        decode_config, prefill_config: tiles, where a bench overrides the tables.

    Returns:
        [T, Hq * Dh].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(
        q=q,
        block_table=block_table,
        slots=slots,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        sinks=sinks,
        slopes=slopes,
    )
    rows, num_heads, head_dim = q.shape
    num_reqs = slots.shape[0]
    num_kv_heads = k_cache.shape[1]
    check_shape("k_cache", k_cache, *k_cache.shape[:3], head_dim)
    check_caches(k_cache, v_cache)
    check_shape("seq_lens", seq_lens, num_reqs)
    check_shape("query_start_loc", query_start_loc, num_reqs + 1)
    for name, values in (("sinks", sinks), ("slopes", slopes)):
        if values is not None:
            check_shape(name, values, num_heads)
    kv = kv_shape(k_cache, num_heads)
    if not 0 <= num_decodes <= min(num_reqs, rows):
        raise ValueError(f"num_decodes {num_decodes}: there are {num_reqs} requests, {rows} rows")
    out = torch.empty((rows, num_heads * head_dim), dtype=q.dtype, device=q.device)
    if num_decodes:
        sums = None
        if shared is not None and sliding_window == 0:
            sums = shared_attention(
                q,
                PagedKV(k_cache, v_cache, block_table, block_table.stride(0)),
                kv,
                slots[:num_decodes],
                seq_lens[:num_decodes],
                shared,
                scale=scale,
                softcap=softcap,
                slopes=slopes,
            )
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
            sinks=sinks,
            slopes=slopes,
            shared=sums,
            config=decode_config,
        )
    if num_decodes == num_reqs:
        return out
    rest = num_reqs - num_decodes
    fast = None
    if prefill_config is None and has_gluon(q.device):
        fast = plan_hopper(
            kv,
            q.dtype,
            k_cache.dtype,
            rows - num_decodes,
            rest,
            sliding_window=sliding_window,
            causal=causal,
            has_slopes=slopes is not None,
        )
    if fast is not None:
        # Gluon is not part of every Triton.
        from .hopper_attention import hopper_prefill

        hopper_prefill(
            q,
            k_cache,
            v_cache,
            block_table,
            slots[num_decodes:],
            seq_lens[num_decodes:],
            query_start_loc[num_decodes:],
            out,
            rows - num_decodes,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            causal=causal,
            sinks=sinks,
            tile=fast,
        )
    else:
        tile = prefill_config or plan_prefill(rows - num_decodes, kv.group, head_dim, q.dtype)
        # Rounding up costs at most one tile a request.
        tiles = (rows - num_decodes) // (tile.block_m // kv.group) + rest
        prefill_kernel[(num_kv_heads, tiles)](
            q,
            PagedKV(k_cache, v_cache, block_table, block_table.stride(0)),
            slots[num_decodes:],
            seq_lens[num_decodes:],
            query_start_loc[num_decodes:],
            out,
            scale,
            softcap if softcap > 0 else None,
            sinks,
            slopes,
            rest,
            KV=kv,
            WINDOW=sliding_window,
            CAUSAL=causal,
            BLOCK_R=block_r(rest),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            PRECISION=FLOAT32_PRECISION if q.dtype == torch.float32 else "ieee",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **pdl_options(),
        )
    return out
