"""Rope with the KV cache's update, and paged attention. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from .tensors import F32, caches, float_code, int_address, matrix, refuse, vector


def qk_norm_rope_store_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """See reference.qk_norm_rope_store_kv.

    Raises:
        ValueError: a position or slot out of range, or tensors that do not fit.
    """
    code, tokens, cols = matrix(qkv, "qkv")
    cache_code, shape = caches(k_cache, v_cache)
    if shape[1] != num_kv_heads or shape[3] != head_dim:
        raise refuse(k_cache, "k_cache", f"of {num_kv_heads} heads of {head_dim}")
    if cols != (num_heads + 2 * num_kv_heads) * head_dim:
        raise refuse(qkv, "qkv", f"(T, ({num_heads} + 2 * {num_kv_heads}) * {head_dim})")
    table_code, max_pos, rot = matrix(cos_sin, "cos_sin")
    if table_code != F32:
        raise refuse(cos_sin, "cos_sin", "float32")
    q_norm_ptr = k_norm_ptr = norm_code = 0
    if q_norm is not None:
        q_norm_ptr, norm_code = vector(q_norm, "q_norm", head_dim)
    if k_norm is not None:
        k_norm_ptr, k_norm_code = vector(k_norm, "k_norm", head_dim)
        if q_norm is not None and k_norm_code != norm_code:
            raise refuse(k_norm, "k_norm", "of q_norm's dtype")
        norm_code = k_norm_code
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    _core.cpu_rope(
        qkv.data_ptr(),
        code,
        tokens,
        int_address(positions, "positions", tokens),
        cos_sin.data_ptr(),
        max_pos,
        rot,
        int_address(slot_mapping, "slot_mapping", tokens),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_code,
        shape,
        num_heads,
        q_norm_ptr,
        k_norm_ptr,
        norm_code,
        eps,
        weight_offset,
        interleaved,
        q.data_ptr(),
    )
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """See reference.paged_attention. Rows of no request are undefined.

    Raises:
        ValueError: a length, slot or block out of range, or tensors that do not fit.
    """
    code = float_code(q, "q")
    cache_code, shape = caches(k_cache, v_cache)
    if q.dim() != 3 or q.shape[2] != shape[3]:
        raise refuse(q, "q", f"(T, heads, {shape[3]})")
    tokens, num_heads, head_dim = q.shape
    if (
        block_table.dtype != torch.int32
        or not block_table.is_cpu
        or not block_table.is_contiguous()
        or block_table.dim() != 2
    ):
        raise refuse(block_table, "block_table", "a contiguous 2-D int32 CPU tensor")
    table_rows, max_blocks = block_table.shape
    requests = slots.numel()
    out = torch.empty((tokens, num_heads * head_dim), dtype=q.dtype)
    _core.cpu_attention(
        q.data_ptr(),
        code,
        tokens,
        num_heads,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_code,
        shape,
        block_table.data_ptr(),
        table_rows,
        max_blocks,
        int_address(slots, "slots", requests),
        int_address(seq_lens, "seq_lens", requests),
        int_address(query_start_loc, "query_start_loc", requests + 1),
        requests,
        scale,
        sliding_window,
        softcap,
        causal,
        max_seq_len,
        out.data_ptr(),
    )
    return out
