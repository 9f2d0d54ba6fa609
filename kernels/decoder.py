"""A decoder's layers as data, for an op set that runs all of them in one call.

``OpSet.make_decoder`` takes such a description and saves the cost of going from op to op. Without
it, or for layers of another build, the model calls the ops itself, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from .weights import Weight


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpec:
    """Pre-norm attention and gated MLP, each added to the residual.

    input_norm, post_norm: [D]. qkv [(Hq + 2 Hkv) Dh, D], o [D, Hq Dh], gate_up [2F, D],
    down [D, F]: prepared weights, each with a bias or None. q_norm, k_norm: [Dh] or None.
    k_cache, v_cache: as ``paged_attention`` takes them; kv_scales as ``qk_norm_rope_store_kv``.
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: tuple[Weight, Tensor | None]
    o: tuple[Weight, Tensor | None]
    gate_up: tuple[Weight, Tensor | None]
    down: tuple[Weight, Tensor | None]
    q_norm: Tensor | None
    k_norm: Tensor | None
    kv_scales: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    sliding_window: int


@dataclass(frozen=True, slots=True, eq=False)
class DecoderSpec:
    """All layers and the final norm [D]; other fields are the single ops' arguments."""

    layers: Sequence[LayerSpec]
    final_norm: Tensor
    cos_sin: Tensor
    num_heads: int
    eps: float
    scale: float
    softcap: float
    act: str
    weight_offset: float = 0.0


# (hidden [T, D], overwritten; the step's StepContext) -> [T, D] after the final norm; with the
# context's ``ends_only`` anything in the rows that are no request's last.
Decoder: TypeAlias = Callable[[Tensor, Any], Tensor]
