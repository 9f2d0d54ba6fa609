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
from .tensors import (
    F32,
    Vector,
    float32_matrix,
    int_matrix,
    ints,
    kv_cache,
    matrix,
    optional_scales,
    optional_vector,
    refuse,
    vector,
)


class CpuDecoder:
    """All layers of a decoder in one call. Activations are float32."""

    def __init__(self, spec: DecoderSpec) -> None:
        """
        Raises:
            ValueError: tensors that do not fit each other.
        """
        caches = [kv_cache(layer.k_cache, layer.v_cache) for layer in spec.layers]
        *_, element, cache_shape = caches[0]
        size = spec.final_norm.numel()
        cos_sin = matrix(spec.cos_sin, "cos_sin")
        if cos_sin[1] != F32:
            raise refuse(spec.cos_sin, "cos_sin", "float32")
        head_dim = cache_shape[3]
        layers = []
        for layer, cache in zip(spec.layers, caches, strict=True):
            if cache[2:] != (element, cache_shape):
                raise refuse(layer.k_cache, "k_cache", "like the first layer's")
            layers.append(
                SimpleNamespace(
                    input_norm=vector(layer.input_norm, "input_norm", size),
                    post_norm=vector(layer.post_norm, "post_norm", size),
                    qkv=_projection(layer.qkv),
                    o=_projection(layer.o),
                    gate_up=_projection(layer.gate_up),
                    down=_projection(layer.down),
                    q_norm=optional_vector(layer.q_norm, "q_norm", head_dim),
                    k_norm=optional_vector(layer.k_norm, "k_norm", head_dim),
                    cache=cache,
                    kv_scales=optional_scales(layer.kv_scales, cache_shape[1]),
                    sliding_window=layer.sliding_window,
                )
            )
        # The caches and cos_sin are read by address.
        self._spec = spec
        self._size = size
        self._forward = _core.CpuDecoder(
            layers,
            vector(spec.final_norm, "final_norm", size),
            num_heads=spec.num_heads,
            cos_sin=cos_sin,
            eps=spec.eps,
            weight_offset=spec.weight_offset,
            scale=spec.scale,
            softcap=spec.softcap,
            kind=spec.act,
        ).forward

    def __call__(self, hidden: Tensor, ctx: Any) -> Tensor:
        """hidden float32 [T, D], overwritten -> [T, D]; of requests of several tokens only the
        last row where ``ctx.ends_only``.

        Raises:
            ValueError: an index of the step is out of range, or tensors do not fit.
        """
        states = _, element, tokens, size = float32_matrix(hidden, "hidden", self._size)
        requests = ctx.slots.numel()
        out = torch.empty_like(hidden)
        self._forward(
            states,
            positions=ints(ctx.positions, "positions", tokens),
            slot_mapping=ints(ctx.slot_mapping, "slot_mapping", tokens),
            block_table=int_matrix(ctx.block_table, "block_table"),
            slots=ints(ctx.slots, "slots", requests),
            seq_lens=ints(ctx.seq_lens, "seq_lens", requests),
            query_start_loc=ints(ctx.query_start_loc, "query_start_loc", requests + 1),
            ends_only=ctx.ends_only,
            out=(out.data_ptr(), element, tokens, size),
        )
        return out


def _projection(
    part: tuple[Weight, Tensor | None],
) -> tuple[_core.CpuLinear, Vector | None, int]:
    weight, bias = packed(part[0]), part[1]
    return weight.handle, optional_vector(bias, "bias", weight.shape[0]), weight.activation_bits


def make_decoder(spec: DecoderSpec) -> CpuDecoder:
    """The layers in one call.

    Raises:
        ValueError: tensors that do not fit each other, or a weight of another backend.
    """
    return CpuDecoder(spec)
