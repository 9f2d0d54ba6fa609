"""An encoder's layers as data, for an op set that runs all of them in one call.

Optional, as ``decoder``: where ``OpSet.make_encoder`` is None, the model calls the ops itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .weights import Weight

Dense: TypeAlias = tuple[Weight, Tensor | None]
NormWeights: TypeAlias = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class EncoderLayerSpec:
    """x = o_norm(x + o(attention(qkv(x)))), then x = mlp_norm(x + down(act(up(x)))).

    qkv [3D, D], o [D, D], up [F, D], down [D, F]: prepared weights, each with a bias or None.
    o_norm, mlp_norm: layer norms' weights [D] and biases [D] or None.
    """

    qkv: Dense
    o: Dense
    o_norm: NormWeights
    up: Dense
    down: Dense
    mlp_norm: NormWeights


@dataclass(frozen=True, slots=True, eq=False)
class EncoderSpec:
    """All layers; other fields are the single ops' arguments.

    rounded: factors of products may be rounded to 16 bits, where that is faster.
    """

    layers: Sequence[EncoderLayerSpec]
    num_heads: int
    eps: float
    scale: float
    act: str
    rounded: bool = False


# (hidden [T, D], overwritten; query_start_loc int32 [R + 1]) -> the last layer's states, [T, D].
Encoder: TypeAlias = Callable[[Tensor, Tensor], Tensor]
