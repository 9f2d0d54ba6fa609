"""Attention of many single queries over leading blocks that their requests share.

Decode attention reads a request's keys for that request alone. Here the queries of a group of
requests, whose block tables begin with the same blocks, are the rows of one tile, so that shared
keys are read once a tile; decode attention adds the rest of each request and combines both.

The grid does not depend on lengths or on the number of groups: a program takes one unit (a tile of
a group's rows, a split of its keys) after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..shared_prefixes import MAX_GROUPS, SharedPrefixes
from .launch import cdiv, next_power_of_2, num_sms, pdl_options
from .online_softmax import empty_softmax
from .paged_kv import KVShape, PagedKV, find_request
from .prefill_steps import prefill_steps

# The most parts that a group's keys are cut into.
MAX_SPLITS = 16
# Keys of a part below which its fixed costs outweigh them.
MIN_SPLIT = 256
PROGRAMS_PER_SM = 1


class SharedSums(NamedTuple):
    """Parts of shared_attention, for decode attention to combine."""

    tokens: torch.Tensor  # [R]
    splits: torch.Tensor  # [R] int32, of rows whose tokens are not 0
    partial: torch.Tensor  # float32: acc [num_splits, R, Hq, Dh], row_max, row_sum without Dh
    num_splits: int


class SharedTile(NamedTuple):
    """Rows (requests x heads of a group) and keys of a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def shared_rows(partial, split, num_splits, num_reqs, row, d, KV: tl.constexpr):
    """Pointers to a split's acc [M, BLOCK_D], row_max and row_sum [M] of rows (request, head)."""
    rows = num_reqs.to(tl.int64) * (KV.num_kv_heads * KV.group)
    at = split * rows + row
    maxima = partial + num_splits * rows * KV.head_dim
    sums = maxima + num_splits * rows
    return partial + at[:, None] * KV.head_dim + d[None, :], maxima + at, sums + at


@triton.jit(do_not_specialize=["num_reqs", "num_splits"])
def shared_kernel(
    q,  # [R, Hq, Dh]
    kv,  # PagedKV
    slots,  # [R]
    seq_lens,  # [R]
    groups,  # [MAX_GROUPS, 3]
    members,  # [R]
    splits,  # [R]
    partial,
    scale,
    softcap,  # None: none
    slopes,  # [Hq] float32; None: none
    num_reqs,
    num_splits,  # the most
    KV: tl.constexpr,  # KVShape
    GROUPS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // KV.group  # requests of a tile
    pid = tl.program_id(0)
    kv_head = pid % KV.num_kv_heads
    programs = tl.num_programs(0) // KV.num_kv_heads
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    lanes = tl.arange(0, GROUPS)
    firsts = tl.load(groups + lanes * 3)
    counts = tl.load(groups + lanes * 3 + 1)
    tokens = tl.load(groups + lanes * 3 + 2)
    tiles = tl.cdiv(counts, BLOCK_Q)
    share = tl.maximum(tl.cdiv(tl.sum(tiles * tokens, 0), programs), MIN_KEYS)
    parts = tl.minimum(tl.maximum(tl.cdiv(tokens, share), 1), num_splits)
    chunks = tl.cdiv(tl.cdiv(tokens, parts), BLOCK_N) * BLOCK_N
    parts = tl.cdiv(tokens, tl.maximum(chunks, 1))
    units = tiles * parts
    if PDL:
        tl.extra.cuda.gdc_wait()

    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, KV.block_d)
    for unit in range(pid // KV.num_kv_heads, tl.sum(units, 0), programs):
        group, first_unit, _ = find_request(units, unit, GROUPS)
        mine = lanes == group
        first = tl.sum(tl.where(mine, firsts, 0), 0)
        count = tl.sum(tl.where(mine, counts, 0), 0)
        length = tl.sum(tl.where(mine, tokens, 0), 0)
        part_count = tl.sum(tl.where(mine, parts, 0), 0)
        chunk = tl.sum(tl.where(mine, chunks, 0), 0)
        split = (unit - first_unit) % part_count
        member = (unit - first_unit) // part_count * BLOCK_Q + i // KV.group
        in_rows = (i < BLOCK_Q * KV.group) & (member < count)
        request = tl.load(members + first + member, mask=in_rows, other=0)
        head = kv_head * KV.group + i % KV.group
        row = request.to(tl.int64) * (KV.num_kv_heads * KV.group) + head
        mask = in_rows[:, None] & (d[None, :] < KV.head_dim)
        query = tl.load(q + row[:, None] * KV.head_dim + d[None, :], mask=mask, other=0.0)
        q_position = tl.load(seq_lens + request, mask=in_rows, other=1) - 1
        slot = tl.load(slots + tl.load(members + first)).to(tl.int64)
        begin = split * chunk
        end = tl.minimum(begin + chunk, length)
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        acc, row_max, row_sum = empty_softmax(BLOCK_M, KV.block_d)
        table = kv.block_table + slot * kv.table_stride
        acc, row_max, row_sum = prefill_steps(
            acc, row_max, row_sum, query, q_position, kv, table, kv_head, begin, whole, length,
            scale, softcap, slopes, head, in_rows, KV, 0, False, False, BLOCK_N, "ieee",
        )  # fmt: skip
        acc, row_max, row_sum = prefill_steps(
            acc, row_max, row_sum, query, q_position, kv, table, kv_head, whole, end, length,
            scale, softcap, slopes, head, in_rows, KV, 0, False, True, BLOCK_N, "ieee",
        )  # fmt: skip
        acc_at, max_at, sum_at = shared_rows(partial, split, num_splits, num_reqs, row, d, KV)
        tl.store(acc_at, acc, mask=mask)
        tl.store(max_at, row_max, mask=in_rows)
        tl.store(sum_at, row_sum, mask=in_rows)
        # Once for each request: by its first head.
        counted = in_rows & (head == 0) & (member >= 0)
        tl.store(splits + request, tl.zeros_like(request) + part_count, mask=counted)


def plan_shared(num_reqs: int, group: int, head_dim: int, dtype: torch.dtype) -> SharedTile:
    """The tile for groups among ``num_reqs`` requests of ``group`` heads each."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        return SharedTile(max(32, least), 16, 4, 2)
    if head_dim > 128:
        return SharedTile(max(64, least), 32, 4, 2)
    if num_reqs * group <= 64:
        return SharedTile(max(64, least), 64, 4, 3)
    return SharedTile(max(128, least), 64, 8, 3)


def shared_attention(
    q: torch.Tensor,
    kv: PagedKV,
    shape: KVShape,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    shared: SharedPrefixes,
    *,
    scale: float,
    softcap: float,
    slopes: torch.Tensor | None,
    tile: SharedTile | None = None,
) -> SharedSums:
    """The groups' sums over the tokens they share; arguments that paged_attention has checked."""
    num_reqs = slots.shape[0]
    tile = tile or plan_shared(num_reqs, shape.group, shape.head_dim, q.dtype)
    programs = cdiv(PROGRAMS_PER_SM * num_sms(q.device), shape.num_kv_heads)
    tiles = cdiv(num_reqs * shape.group, tile.block_m)
    num_splits = min(max(cdiv(programs, tiles), 1), MAX_SPLITS)
    heads = shape.num_kv_heads * shape.group
    size = num_splits * num_reqs * heads * (shape.head_dim + 2)
    sums = SharedSums(
        shared.tokens,
        torch.empty(num_reqs, dtype=torch.int32, device=q.device),
        torch.empty(size, dtype=torch.float32, device=q.device),
        num_splits,
    )
    shared_kernel[(programs * shape.num_kv_heads,)](
        q,
        kv,
        slots,
        seq_lens,
        shared.groups,
        shared.members,
        sums.splits,
        sums.partial,
        scale,
        softcap if softcap > 0 else None,
        slopes,
        num_reqs,
        num_splits,
        KV=shape,
        GROUPS=MAX_GROUPS,
        MIN_KEYS=MIN_SPLIT,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl_options(),
    )
    return sums
