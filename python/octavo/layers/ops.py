"""The op set a model computes with: one of kernels.reference, kernels.cpu, kernels.gpu.

Chosen once, when the model is built; layers then hold the functions themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from octavo.kernels.decoder import Decoder, DecoderSpec
from octavo.kernels.encoder import Encoder, EncoderSpec
from octavo.kernels.packed import PackedLinear, QuantTensor

Backend: TypeAlias = Literal["auto", "native", "reference"]
Weight: TypeAlias = Tensor | PackedLinear


class Ops(Protocol):
    """What every op module offers. Shapes and meanings: ``octavo.kernels.reference``."""

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        *,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def embedding(
        self,
        ids: Tensor,
        weight: Weight,
        *,
        scale: float = 1.0,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor: ...

    def activation(self, x: Tensor, kind: str) -> Tensor: ...

    def gated_activation(self, x: Tensor, kind: str) -> Tensor: ...

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        w13: Tensor | Sequence[Weight],
        w2: Tensor | Sequence[Weight],
        top_k: int,
        renormalize: bool,
        *,
        kind: str = "silu",
    ) -> Tensor: ...

    def qk_norm_rope_store_kv(
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
    ) -> Tensor: ...

    def paged_attention(
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
    ) -> Tensor: ...

    def prepare_linear(
        self,
        weight: Tensor | QuantTensor | Sequence[Tensor | QuantTensor],
        *,
        exact: bool = False,
    ) -> Weight: ...

    def prepare_experts(
        self,
        experts: Sequence[Sequence[Tensor | QuantTensor]],
        *,
        exact: bool = False,
    ) -> Tensor | Sequence[Weight]: ...


class FusedOps(Protocol):
    """What an op module may offer beside: the same arithmetic in fewer kernels."""

    def linear_add(
        self, x: Tensor, weight: Weight, residual: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> Tensor: ...

    def norm_gated_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        weight: Weight,
        kind: str,
        *,
        weight_offset: float = 0.0,
    ) -> Tensor: ...


def has_fused_ops(ops: Ops) -> bool:
    """Whether the module also offers FusedOps; where it does not, layers compose the plain ones."""
    return all(hasattr(ops, name) for name in ("linear_add", "norm_linear", "norm_gated_linear"))


def fused_decode(ops: Ops, head_dim: int) -> tuple[Callable[..., Tensor] | None, int]:
    """``rope_decode_attention`` and the most rows it pays for, where the module has it.

    It is qk_norm_rope_store_kv and paged_attention of a step of decodes alone, in one kernel.
    """
    function: Callable[..., Tensor] | None = getattr(ops, "rope_decode_attention", None)
    most: Callable[[int], int] = getattr(ops, "max_rope_decodes", lambda head_dim: 0)
    return function, most(head_dim)


def get_ops(device: torch.device, backend: Backend) -> Ops:
    """The op module for a device: ``native`` (and ``auto``) is Triton on a GPU, Rust on a CPU.

    Raises:
        ImportError: the native module cannot be imported (the compiled core is missing).
    """
    native = "cpu" if device.type == "cpu" else "gpu"
    name = "reference" if backend == "reference" else native
    return cast(Ops, importlib.import_module(f"octavo.kernels.{name}"))


def make_decoder(ops: Ops, spec: DecoderSpec) -> Decoder | None:
    """All layers in one call, where the op set offers that for these weights."""
    make: Callable[[DecoderSpec], Decoder | None] | None = getattr(ops, "make_decoder", None)
    return None if make is None else make(spec)


def make_encoder(ops: Ops, spec: EncoderSpec) -> Encoder | None:
    """As ``make_decoder``, of an encoder."""
    make: Callable[[EncoderSpec], Encoder | None] | None = getattr(ops, "make_encoder", None)
    return None if make is None else make(spec)
