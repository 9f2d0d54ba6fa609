"""Attention over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext


class Attention:
    """Rope, store this step's keys and values, attend to all of the request's.

    ``k_cache``, ``v_cache``: [num_blocks, num_kv_heads, block_size, head_dim]; empty until the
    runner binds them. ``cos_sin``: float32 [max_model_len, rot_dim], shared by the layers.
    ``q_norm``, ``k_norm``: [head_dim] or None; ``scale`` of the scores: head_dim ** -0.5 if None.
    ``interleaved``: rope turns neighbours. ``sinks``, ``slopes``: float32 [num_heads], as
    ``paged_attention`` takes them, or None. ``kv_scales``: static ones of a cache of bytes, float32
    [2, num_kv_heads], or None. ``causal``: False where the texts of a step are whole
    and attention goes in both directions. ``num_kv_heads`` 0: the caches are another layer's, which
    has stored this step's keys and values before; queries are all that there is of the projection.
    """

    __slots__ = (
        "_max_rope_decodes",
        "_paged_attention",
        "_q_factor",
        "_rope_decode",
        "_rope_store",
        "causal",
        "cos_sin",
        "eps",
        "head_dim",
        "interleaved",
        "is_chunked",
        "k_cache",
        "k_norm",
        "kv_scales",
        "num_heads",
        "num_kv_heads",
        "q_norm",
        "scale",
        "sinks",
        "sliding_window",
        "slopes",
        "softcap",
        "v_cache",
        "weight_offset",
    )

    def __init__(
        self,
        ops: OpSet,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cos_sin: Tensor,
        scale: float | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        sliding_window: int = 0,
        softcap: float = 0.0,
        interleaved: bool = False,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
        kv_scales: Tensor | None = None,
    ) -> None:
        self._rope_store = ops.qk_norm_rope_store_kv
        self._paged_attention = ops.paged_attention
        # Static scales are rare, and the fused kernel computes each row's.
        fused = ops.fused_decode if num_kv_heads and kv_scales is None else None
        self._rope_decode = None if fused is None else fused.attend
        self._max_rope_decodes = 0 if fused is None else fused.max_rows(head_dim)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.cos_sin = cos_sin
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.eps = eps
        self.weight_offset = weight_offset
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.interleaved = interleaved
        self.sinks = sinks
        self.slopes = slopes
        self.kv_scales = kv_scales
        self.causal = True
        self.is_chunked = False
        self._q_factor: Tensor | None = None
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)

    def set_chunked(self, is_chunked: bool) -> None:
        """Attend to a query's own chunk alone: ``StepContext.chunks``."""
        self.is_chunked = is_chunked
        if is_chunked:
            self._rope_decode = None

    def set_q_factor(self, factor: Tensor) -> None:
        """Multiply queries by ``factor`` [head_dim] once they are rotated."""
        self._q_factor = factor
        self._rope_decode = None

    def __call__(self, qkv: Tensor, ctx: StepContext) -> Tensor:
        """qkv [T, (num_heads + 2 * num_kv_heads) * head_dim] -> [T, num_heads * head_dim]."""
        if (
            self._rope_decode is not None
            and (ctx.shared is None or self.sliding_window > 0)
            and ctx.num_decodes == ctx.num_reqs <= self._max_rope_decodes
        ):
            return self._rope_decode(
                qkv,
                self.cos_sin,
                ctx.slot_mapping,
                self.k_cache,
                self.v_cache,
                ctx.block_table,
                ctx.slots,
                ctx.seq_lens,
                num_heads=self.num_heads,
                scale=self.scale,
                q_norm=self.q_norm,
                k_norm=self.k_norm,
                eps=self.eps,
                weight_offset=self.weight_offset,
                interleaved=self.interleaved,
                sliding_window=self.sliding_window,
                softcap=self.softcap,
                sinks=self.sinks,
                slopes=self.slopes,
            )
        k_cache, v_cache = self.k_cache, self.v_cache
        if self.num_kv_heads == 0:
            k_cache, v_cache = k_cache[:, :0], v_cache[:, :0]
        q = self._rope_store(
            qkv,
            ctx.positions,
            self.cos_sin,
            ctx.slot_mapping,
            k_cache,
            v_cache,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
            weight_offset=self.weight_offset,
            interleaved=self.interleaved,
            kv_scales=self.kv_scales,
        )
        if self._q_factor is not None:
            q = (q * self._q_factor).to(q.dtype)
        if self.is_chunked:
            assert ctx.chunks is not None
            ctx = ctx.chunks
        return self._paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            ctx.block_table,
            ctx.slots,
            ctx.seq_lens,
            ctx.query_start_loc,
            scale=self.scale,
            num_decodes=ctx.num_decodes,
            max_query_len=ctx.max_query_len,
            max_seq_len=ctx.max_seq_len,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            causal=self.causal,
            sinks=self.sinks,
            slopes=self.slopes,
            shared=ctx.shared,
        )
