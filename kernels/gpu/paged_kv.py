"""The paged KV cache inside attention kernels: its shape, a program's request, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..kv_cache import LARGEST, head_stride, is_whole
from .launch import check_shape, next_power_of_2


class KVShape(NamedTuple):
    """A cache's shape and its query heads, constants of a kernel."""

    num_kv_heads: int
    group: int  # query heads of one KV head
    head_dim: int
    block_size: int  # tokens
    block_d: int  # a power of two that holds head_dim
    head_stride: int  # elements from a block's head to the next
    largest: float  # number of a byte that is used; 0: elements are floats without a scale


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
    return KVShape(
        num_kv_heads,
        num_heads // num_kv_heads,
        head_dim,
        block_size,
        block_d,
        head_stride(block_size, head_dim, k_cache.dtype),
        LARGEST.get(k_cache.dtype, 0.0),
    )


def check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raises ValueError: caches of several shapes or types, or not as ``make_cache`` makes them."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, *k_cache.shape)
        if cache.dtype != k_cache.dtype:
            raise ValueError(f"{name} is {cache.dtype}, k_cache {k_cache.dtype}")
        if not is_whole(cache):
            raise ValueError(f"{name} must be contiguous, its strides are {cache.stride()}")


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
    """The offset of a head's row of a token in a block of a cache, in elements."""
    return (block * KV.num_kv_heads + kv_head) * KV.head_stride + offset * KV.head_dim


@triton.jit
def cache_scale(block, offset, kv_head, KV: tl.constexpr):
    """The offset of the row's scale, in float32s."""
    head = (block * KV.num_kv_heads + kv_head) * KV.head_stride
    return (head + KV.block_size * KV.head_dim) // 4 + offset


@triton.jit
def row_scales(rows, LARGEST: tl.constexpr):
    """Scales [N] of rows float32 [N, D], zeros where masked, in a type of a byte."""
    return tl.maximum(tl.max(tl.abs(rows), 1), 1e-12) / LARGEST


@triton.jit
def to_bytes(rows, scale, LARGEST: tl.constexpr, type: tl.constexpr):
    """Rows float32 [N, D], zeros where masked, over scales [N] in a type of a byte."""
    # Rounding may reach beyond the maximum, and what is beyond it is no number.
    scaled = tl.minimum(tl.maximum(rows / scale[:, None], -LARGEST), LARGEST)
    if type == tl.int8:
        scaled = tl.floor(scaled + 0.5)
    return scaled.to(type)


@triton.jit
def from_bytes(elements, scale, type: tl.constexpr):
    """Elements of a byte times their scales, in type; by conversions that are fast."""
    if elements.dtype == tl.int8:
        # The bits of 1024 + 128 + the integer as a float16.
        bits = ((elements.to(tl.int16) & 0xFF) ^ 0x80) | 0x6400
        floats = bits.to(tl.float16, bitcast=True).to(tl.float32) - 1152.0
    else:
        floats = elements.to(tl.float16).to(tl.float32)
    return (floats * scale).to(type)


@triton.jit
def load_words(cache, row, valid, scale, KV: tl.constexpr, type: tl.constexpr):
    """Rows [BLOCK_N, BLOCK_D] of a cache of a byte an element times their scales, in type.

    By words of four elements, which become floats before they go where the matrix units take them
    from: bytes would be taken from there one by one (bench/NOTES.md, "Keys and values of a byte").
    """
    N: tl.constexpr = row.shape[0]
    D: tl.constexpr = KV.block_d
    w = tl.arange(0, D // 4)
    words = tl.load(
        cache.to(tl.pointer_type(tl.int32)) + (row // 4)[:, None] + w[None, :],
        mask=valid[:, None] & (w[None, :] < KV.head_dim // 4),
        other=0,
    )
    source: tl.constexpr = cache.dtype.element_ty
    scale = scale[:, None]
    b0 = from_bytes(words.to(tl.int8).to(source, bitcast=True), scale, type)
    b1 = from_bytes((words >> 8).to(tl.int8).to(source, bitcast=True), scale, type)
    b2 = from_bytes((words >> 16).to(tl.int8).to(source, bitcast=True), scale, type)
    b3 = from_bytes((words >> 24).to(tl.int8).to(source, bitcast=True), scale, type)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (N, D))


@triton.jit
def load_keys_and_values(
    kv,  # PagedKV
    table,  # the request's row of the block table
    kv_head,
    position,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    KV: tl.constexpr,
    type: tl.constexpr,  # of the queries
):
    """keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D]; zero where not valid.

    In the cache's type, or in the queries' if it has scales.
    """
    d = tl.arange(0, KV.block_d)
    block = tl.load(table + position // KV.block_size, mask=valid, other=0).to(tl.int64)
    row = cache_row(block, position % KV.block_size, kv_head, KV)
    keys = tl.load(
        kv.k_cache + row[None, :] + d[:, None],
        mask=valid[None, :] & (d[:, None] < KV.head_dim),
        other=0.0,
    )
    if KV.largest > 0:
        at = cache_scale(block, position % KV.block_size, kv_head, KV)
        floats = tl.pointer_type(tl.float32)
        k_scale = tl.load(kv.k_cache.to(floats) + at, mask=valid, other=0.0)
        v_scale = tl.load(kv.v_cache.to(floats) + at, mask=valid, other=0.0)
        keys = from_bytes(keys, k_scale[None, :], type)
        values = load_words(kv.v_cache, row, valid, v_scale, KV, type)
    else:
        values = tl.load(
            kv.v_cache + row[:, None] + d[None, :],
            mask=valid[:, None] & (d[None, :] < KV.head_dim),
            other=0.0,
        )
    return keys, values


@triton.jit
def load_all_keys_and_values(kv, table, kv_head, position, KV: tl.constexpr, type: tl.constexpr):
    """load_keys_and_values where every position is valid: no masks but that of the head."""
    d = tl.arange(0, KV.block_d)
    block = tl.load(table + position // KV.block_size).to(tl.int64)
    row = cache_row(block, position % KV.block_size, kv_head, KV)
    k_at = kv.k_cache + row[None, :] + d[:, None]
    v_at = kv.v_cache + row[:, None] + d[None, :]
    if KV.head_dim == KV.block_d:
        keys = tl.load(k_at)
    else:
        keys = tl.load(k_at, mask=d[:, None] < KV.head_dim, other=0.0)
    if KV.largest > 0:
        at = cache_scale(block, position % KV.block_size, kv_head, KV)
        floats = tl.pointer_type(tl.float32)
        keys = from_bytes(keys, tl.load(kv.k_cache.to(floats) + at)[None, :], type)
        v_scale = tl.load(kv.v_cache.to(floats) + at)
        values = load_words(kv.v_cache, row, position >= 0, v_scale, KV, type)
    elif KV.head_dim == KV.block_d:
        values = tl.load(v_at)
    else:
        values = tl.load(v_at, mask=d[None, :] < KV.head_dim, other=0.0)
    return keys, values
