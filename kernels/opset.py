"""OpSet: the ops of one backend; ``reference``, ``cpu`` and ``gpu`` each build one.

Shapes and meanings of every op: ``reference``. Optional members are None where a backend has no
such op, and the layers then compose others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .decoder import Decoder, DecoderSpec
from .encoder import Encoder, EncoderSpec
from .rank import ALONE, Rank
from .recurrent import RecurrentOps
from .shared_prefixes import SharedPrefixes
from .weights import ExpertBiases, Experts, Stored, Weight


class Prepare(Protocol):
    """Stored parts, stacked along N, in the backend's layout."""

    def __call__(self, parts: Sequence[Stored], *, exact: bool = False) -> Weight: ...


class PrepareExperts(Protocol):
    """Each expert's gate and up parts, and each one's down part, in the backend's layout."""

    def __call__(
        self,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        *,
        biases: ExpertBiases | None = None,
        exact: bool = False,
    ) -> Experts: ...


class RmsNorm(Protocol):
    """``reference.rms_norm``."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class LayerNorm(Protocol):
    """``reference.layer_norm``."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        *,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


class RopeStore(Protocol):
    """``reference.qk_norm_rope_store_kv``."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class PagedAttention(Protocol):
    """``reference.paged_attention``."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class LatentAttention(Protocol):
    """``reference.latent_attention``."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class RopeDecode(Protocol):
    """qk_norm_rope_store_kv and paged_attention of a step of decodes alone, in one kernel."""

    def __call__(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        slot_mapping: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        slots: Tensor,
        seq_lens: Tensor,
        *,
        num_heads: int,
        scale: float,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        interleaved: bool = False,
        sliding_window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FusedDecode:
    """A RopeDecode, and the largest step it pays for: ``max_rows(head_dim)`` decodes."""

    attend: RopeDecode
    max_rows: Callable[[int], int]


@dataclass(frozen=True, slots=True)
class ThreadPool:
    """A backend's own threads. ``resize(0)`` is every core this process may use."""

    resize: Callable[[int], None]
    size: Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSet:
    """One backend's ops.

    exact: quantized weights meet float activations and never int8 ones, in every weight that
        ``weight`` and ``experts`` prepare.
    rank: the shard whose part of a model is made of these ops.
    """

    prepare: Prepare
    prepare_experts: PrepareExperts
    rms_norm: RmsNorm
    layer_norm: LayerNorm
    activation: Callable[[Tensor, str], Tensor]
    gated_activation: Callable[[Tensor, str], Tensor]
    qk_norm_rope_store_kv: RopeStore
    paged_attention: PagedAttention
    store_latent: Callable[[Tensor, Tensor, Tensor], None]
    latent_attention: LatentAttention
    fused_decode: FusedDecode | None = None
    # None: the backend has no layers that keep a state.
    recurrent: RecurrentOps | None = None
    # All layers in one call; None for a model that the backend cannot run so.
    make_decoder: Callable[[DecoderSpec], Decoder] | None = None
    make_encoder: Callable[[EncoderSpec], Encoder] | None = None
    # None: the ops run on torch's threads.
    threads: ThreadPool | None = None
    exact: bool = False
    rank: Rank = ALONE

    def weight(self, parts: Sequence[Stored], *, exact: bool = False) -> Weight:
        """Parts stacked along N, ready to be computed with.

        exact: even if the op set is not.

        Raises:
            ValueError: parts that do not stack.
        """
        return self.prepare(parts, exact=exact or self.exact)

    def experts(
        self,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        biases: ExpertBiases | None = None,
    ) -> Experts:
        """Each expert's gate and up parts [F, D] and down part [D, F], ready to be computed with.

        Without a gate there is an up part alone.

        Raises:
            ValueError: parts that do not stack.
        """
        return self.prepare_experts(gate_up, down, biases=biases, exact=self.exact)

    def exactly(self) -> OpSet:
        """The same ops with exact weights."""
        return replace(self, exact=True)
