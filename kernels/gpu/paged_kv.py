"""The paged KV cache inside attention kernels: its shape, a program's request, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import next_power_of_2


class KVShape(NamedTuple):
    """A cache's shape and its query heads, constants of a kernel."""

    num_kv_heads: int
    group: int  # query heads of one KV head
    head_dim: int
    block_size: int  # tokens
    block_d: int  # a power of two that holds head_dim


class PagedKV(NamedTuple):
    """A cache and its block table, arguments of a kernel."""

    k_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [slots, max_blocks]
    table_stride: int


def kv_shape(k_cache: torch.Tensor, num_heads: int) -> KVShape:
    """The shape of a cache [num_blocks, Hkv, block_size, Dh] read by ``num_heads`` query heads.

    Raises:
        ValueError: the query heads do not divide among the KV heads.
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    block_d = max(next_power_of_2(head_dim), 16)
    return KVShape(num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, block_d)


def block_r(num_reqs: int) -> int:
    """Lanes of find_request: few sizes, so that few kernels are compiled."""
    for size in (16, 256):
        if num_reqs <= size:
            return size
    return next_power_of_2(num_reqs)


@triton.jit
def find_request(counts, index, BLOCK_R: tl.constexpr):
    """The request that the index-th unit belongs to, counts[r] units each.

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
def cache_row(block, offset, kv_head, KV: tl.constexpr):
    """Number of a head's row in a cache [num_blocks, Hkv, block_size], of a token in a block."""
    return (block * KV.num_kv_heads + kv_head) * KV.block_size + offset


@triton.jit
def load_keys_and_values(
    kv,  # PagedKV
    table,  # the request's row of the block table
    kv_head,
    position,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    KV: tl.constexpr,
):
    """keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D]; zero where not valid."""
    d = tl.arange(0, KV.block_d)
    block = tl.load(table + position // KV.block_size, mask=valid, other=0).to(tl.int64)
    row = cache_row(block, position % KV.block_size, kv_head, KV)
    keys = tl.load(
        kv.k_cache + row[None, :] * KV.head_dim + d[:, None],
        mask=valid[None, :] & (d[:, None] < KV.head_dim),
        other=0.0,
    )
    values = tl.load(
        kv.v_cache + row[:, None] * KV.head_dim + d[None, :],
        mask=valid[:, None] & (d[None, :] < KV.head_dim),
        other=0.0,
    )
    return keys, values


@triton.jit
def load_all_keys_and_values(kv, table, kv_head, position, KV: tl.constexpr):
    """load_keys_and_values where every position is valid: no masks but that of the head."""
    d = tl.arange(0, KV.block_d)
    block = tl.load(table + position // KV.block_size).to(tl.int64)
    row = cache_row(block, position % KV.block_size, kv_head, KV)
    k_at = kv.k_cache + row[None, :] * KV.head_dim + d[:, None]
    v_at = kv.v_cache + row[:, None] * KV.head_dim + d[None, :]
    if KV.head_dim == KV.block_d:
        keys = tl.load(k_at)
        values = tl.load(v_at)
    else:
        keys = tl.load(k_at, mask=d[:, None] < KV.head_dim, other=0.0)
        values = tl.load(v_at, mask=d[None, :] < KV.head_dim, other=0.0)
    return keys, values
