"""What a model tells an op set of its layers, so that it can run them all in one call.

Optional: an op set that offers ``make_decoder(spec)`` saves the way from op to op; where it has
none, or returns None, the model calls the ops itself. Both give the same results.
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
    k_cache, v_cache: as ``paged_attention`` takes them.
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: tuple[Weight, Tensor | None]
    o: tuple[Weight, Tensor | None]
    gate_up: tuple[Weight, Tensor | None]
    down: tuple[Weight, Tensor | None]
    q_norm: Tensor | None
    k_norm: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    sliding_window: int


@dataclass(frozen=True, slots=True, eq=False)
class DecoderSpec:
    """All layers and the final norm [D]; the rest is what the single ops take."""

    layers: Sequence[LayerSpec]
    final_norm: Tensor
    cos_sin: Tensor
    num_heads: int
    eps: float
    scale: float
    softcap: float
    act: str
    weight_offset: float = 0.0


# (hidden [T, D], overwritten; the step's AttentionContext) -> [T, D] after the final norm; with the
# context's ``ends_only`` anything in the rows that are no request's last.
Decoder: TypeAlias = Callable[[Tensor, Any], Tensor]
