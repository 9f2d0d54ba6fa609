"""The op set in Triton, for CUDA devices; on CPU tensors only with TRITON_INTERPRET=1.

Everything here can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..packed import PackedLinear, QuantTensor
from ..reference import argmax, prepare_experts, selected_logprobs
from ..reference import prepare_linear as _dequantize
from .activation import activation, gated_activation
from .adjust_logits import adjust_logits
from .attention import paged_attention
from .compile_only import compile_only
from .embedding import embedding
from .launch import set_pdl
from .linear import linear, linear_add, norm_gated_linear, norm_linear
from .moe import moe
from .norm import layer_norm, rms_norm
from .rope import qk_norm_rope_store_kv
from .rope_decode_attention import max_rope_decodes, rope_decode_attention
from .sample import sample
from .slots import HostIds, SamplingState
from .step import StepBuffers, prepare_step

__all__ = [
    "HostIds",
    "SamplingState",
    "StepBuffers",
    "activation",
    "adjust_logits",
    "argmax",
    "compile_only",
    "embedding",
    "gated_activation",
    "layer_norm",
    "linear",
    "linear_add",
    "max_rope_decodes",
    "moe",
    "norm_gated_linear",
    "norm_linear",
    "paged_attention",
    "prepare_experts",
    "prepare_linear",
    "prepare_step",
    "qk_norm_rope_store_kv",
    "rms_norm",
    "rope_decode_attention",
    "sample",
    "selected_logprobs",
    "set_pdl",
]


def prepare_linear(
    weight: Tensor | QuantTensor | Sequence[Tensor | QuantTensor], *, exact: bool = False
) -> Tensor:
    """What ``linear`` reads: one dense contiguous weight [N, K]; quantized ones give float32."""
    dense = _dequantize(weight, exact=exact)
    return (dense.dequantize() if isinstance(dense, PackedLinear) else dense).contiguous()
