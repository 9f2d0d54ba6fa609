"""All layers of a model in one call of the Rust core, on a CPU.

A small model's step is two hundred ops of some ten microseconds each: going from one to the next
through Python would take as long as the arithmetic. The whole call runs without the GIL.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from octavo import _core

from ..decoder import DecoderSpec
from ..weights import Weight
from .linear import packed
from .tensors import F32, caches, float_code, int_address, matrix, refuse, vector


class CpuDecoder:
    """All layers of a decoder in one call. Activations are float32."""

    def __init__(self, spec: DecoderSpec) -> None:
        """
        Raises:
            ValueError: tensors that do not fit each other.
        """
        first = spec.layers[0]
        cache_code, cache_shape = caches(first.k_cache, first.v_cache)
        size = spec.final_norm.numel()
        code, max_pos, rot = matrix(spec.cos_sin, "cos_sin")
        if code != F32:
            raise refuse(spec.cos_sin, "cos_sin", "float32")
        head_dim = cache_shape[3]
        layers = []
        for layer in spec.layers:
            if caches(layer.k_cache, layer.v_cache) != (cache_code, cache_shape):
                raise refuse(layer.k_cache, "k_cache", "like the first layer's")
            layers.append(
                SimpleNamespace(
                    input_norm=vector(layer.input_norm, "input_norm", size),
                    post_norm=vector(layer.post_norm, "post_norm", size),
                    qkv=_projection(layer.qkv),
                    o=_projection(layer.o),
                    gate_up=_projection(layer.gate_up),
                    down=_projection(layer.down),
                    q_norm=vector(layer.q_norm, "q_norm", head_dim),
                    k_norm=vector(layer.k_norm, "k_norm", head_dim),
                    k_cache=layer.k_cache.data_ptr(),
                    v_cache=layer.v_cache.data_ptr(),
                    sliding_window=layer.sliding_window,
                )
            )
        # Its tensors are read by address.
        self._spec = spec
        self._size = size
        self._forward = _core.CpuDecoder(
            layers,
            size,
            vector(spec.final_norm, "final_norm", size),
            spec.num_heads,
            cache_code,
            cache_shape,
            spec.cos_sin.data_ptr(),
            max_pos,
            rot,
            spec.eps,
            spec.weight_offset,
            spec.scale,
            spec.softcap,
            spec.act,
        ).forward

    def __call__(self, hidden: Tensor, ctx: Any) -> Tensor:
        """hidden float32 [T, D], overwritten -> [T, D]; of requests of several tokens only the
        last row where ``ctx.ends_only``.

        Raises:
            ValueError: an index of the step is out of range, or tensors do not fit.
        """
        code = float_code(hidden, "hidden")
        if code != F32 or hidden.dim() != 2 or hidden.shape[1] != self._size:
            raise refuse(hidden, "hidden", f"float32 (T, {self._size})")
        tokens = hidden.shape[0]
        table = ctx.block_table
        table_rows, max_blocks = table.shape
        requests = ctx.slots.numel()
        out = torch.empty_like(hidden)
        self._forward(
            hidden.data_ptr(),
            tokens,
            int_address(ctx.positions, "positions", tokens),
            int_address(ctx.slot_mapping, "slot_mapping", tokens),
            int_address(table.view(-1), "block_table", table_rows * max_blocks),
            table_rows,
            max_blocks,
            int_address(ctx.slots, "slots", requests),
            int_address(ctx.seq_lens, "seq_lens", requests),
            int_address(ctx.query_start_loc, "query_start_loc", requests + 1),
            requests,
            ctx.ends_only,
            out.data_ptr(),
        )
        return out


def _projection(
    part: tuple[Weight, Tensor | None],
) -> tuple[_core.CpuLinear, tuple[int, int], bool]:
    weight, bias = packed(part[0]), part[1]
    return weight.handle, vector(bias, "bias", weight.shape[0]), weight.exact


def make_decoder(spec: DecoderSpec) -> CpuDecoder:
    """The layers in one call.

    Raises:
        ValueError: tensors that do not fit each other, or a weight of another backend.
    """
    return CpuDecoder(spec)
