"""RecurrentOps: the ops of layers that keep a state of all tokens so far, not keys and values.

States are rows of one tensor: a request's is at its slot, and the op brings it past the step's
tokens. A request that begins (its first token is in the step) finds a state of zeros, whatever its
row holds. Steps are described as in ``reference.paged_attention``. Shapes and meanings:
``reference_recurrent``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Steps(NamedTuple):
    """The requests of a step: R requests of together T tokens; all tensors int32.

    ``num_decodes`` leading requests have one token each; ``max_query_len``: of the longest.
    """

    slots: Tensor  # [R]  row of the states
    seq_lens: Tensor  # [R]  tokens so far, the step's included; 0: padding, which has no state
    query_start_loc: Tensor  # [R + 1]
    num_decodes: int
    max_query_len: int


class CausalConv(Protocol):
    """``reference_recurrent.causal_conv``."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        steps: Steps,
        *,
        activation: str = "",
    ) -> Tensor: ...


class ShortConv(Protocol):
    """``reference_recurrent.short_conv``."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, steps: Steps
    ) -> Tensor: ...


class GatedDeltaRule(Protocol):
    """``reference_recurrent.gated_delta_rule``."""

    def __call__(
        self,
        qkv: Tensor,
        a: Tensor,
        b: Tensor,
        decay: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        steps: Steps,
        *,
        num_key_heads: int,
        beta_scale: float = 1.0,
    ) -> Tensor: ...


class SelectiveScan(Protocol):
    """``reference_recurrent.selective_scan``."""

    def __call__(
        self,
        xbc: Tensor,
        dt: Tensor,
        decay: Tensor,
        dt_bias: Tensor,
        skip: Tensor,
        state: Tensor,
        steps: Steps,
        *,
        num_groups: int,
        dt_limits: tuple[float, float],
    ) -> Tensor: ...


class GatedNorm(Protocol):
    """``reference_recurrent.gated_norm``."""

    def __call__(
        self,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        eps: float,
        *,
        group_size: int,
        gate_first: bool,
    ) -> Tensor: ...


class CopyRows(Protocol):
    """``reference_recurrent.copy_rows``."""

    def __call__(self, states: Tensor, rows: Tensor) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentOps:
    """One backend's ops of such layers."""

    causal_conv: CausalConv
    short_conv: ShortConv
    gated_delta_rule: GatedDeltaRule
    selective_scan: SelectiveScan
    gated_norm: GatedNorm
    copy_rows: CopyRows
