"""Rope with the KV cache's update, and paged attention. Semantics: ``reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import _core

from ..shared_prefixes import SharedPrefixes
from .tensors import (
    F32,
    Vector,
    float_type,
    int_matrix,
    ints,
    kv_cache,
    matrix,
    optional_scales,
    optional_vector,
    refuse,
)


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
    kv_scales: Tensor | None = None,
) -> Tensor:
    """See reference.qk_norm_rope_store_kv.

    Raises:
        ValueError: a position or slot out of range, or tensors that do not fit.
    """
    qkv_matrix = _, element, tokens, cols = matrix(qkv, "qkv")
    cache = kv_cache(k_cache, v_cache)
    _, heads, _, dim, _ = cache[3]
    if heads != num_kv_heads or dim != head_dim:
        raise refuse(k_cache, "k_cache", f"of {num_kv_heads} heads of {head_dim}")
    if cols != (num_heads + 2 * num_kv_heads) * head_dim:
        raise refuse(qkv, "qkv", f"(T, ({num_heads} + 2 * {num_kv_heads}) * {head_dim})")
    table = matrix(cos_sin, "cos_sin")
    if table[1] != F32:
        raise refuse(cos_sin, "cos_sin", "float32")
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    _core.cpu_rope(
        qkv_matrix,
        cache,
        positions=ints(positions, "positions", tokens),
        cos_sin=table,
        slot_mapping=ints(slot_mapping, "slot_mapping", tokens),
        kv_scales=optional_scales(kv_scales, num_kv_heads),
        num_heads=num_heads,
        q_norm=optional_vector(q_norm, "q_norm", head_dim),
        k_norm=optional_vector(k_norm, "k_norm", head_dim),
        eps=eps,
        weight_offset=weight_offset,
        interleaved=interleaved,
        q=(q.data_ptr(), element, tokens, num_heads * head_dim),
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
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    """See reference.paged_attention. Rows of no request are undefined; each request attends alone.

    Raises:
        ValueError: a length, slot or block out of range, or tensors that do not fit.
    """
    element = float_type(q, "q")
    cache = kv_cache(k_cache, v_cache)
    dim = cache[3][3]
    if q.dim() != 3 or q.shape[2] != dim:
        raise refuse(q, "q", f"(T, heads, {dim})")
    tokens, num_heads, _ = q.shape
    cols = num_heads * dim
    requests = slots.numel()
    out = torch.empty((tokens, cols), dtype=q.dtype)
    _core.cpu_attention(
        (q.data_ptr(), element, tokens, cols),
        cache,
        block_table=int_matrix(block_table, "block_table"),
        slots=ints(slots, "slots", requests),
        seq_lens=ints(seq_lens, "seq_lens", requests),
        query_start_loc=ints(query_start_loc, "query_start_loc", requests + 1),
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        causal=causal,
        sinks=_floats(sinks, "sinks", num_heads),
        slopes=_floats(slopes, "slopes", num_heads),
        max_seq_len=max_seq_len,
        out=(out.data_ptr(), element, tokens, cols),
    )
    return out


def latent_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    value_dim: int,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
) -> Tensor:
    """See reference.latent_attention. Rows of no request are undefined.

    Raises:
        ValueError: as ``paged_attention``.
    """
    tokens, num_heads, dim = q.shape
    out = paged_attention(
        q,
        cache,
        cache,
        block_table,
        slots,
        seq_lens,
        query_start_loc,
        scale=scale,
        num_decodes=num_decodes,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )
    return out.view(tokens, num_heads, dim)[..., dim - value_dim :]


def _floats(values: Tensor | None, name: str, size: int) -> Vector | None:
    """A float32 value a head, or None."""
    if values is not None and values.dtype != torch.float32:
        raise refuse(values, name, f"({size},) float32")
    return optional_vector(values, name, size)
