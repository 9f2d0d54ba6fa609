"""The op set in Triton, for CUDA devices; on CPU tensors only with TRITON_INTERPRET=1.

Everything here can be captured into a CUDA graph.
"""

from __future__ import annotations

from ..opset import FusedDecode, OpSet
from ..reference import argmax, selected_logprobs
from .activation import activation, gated_activation
from .adjust_logits import adjust_logits
from .attention import paged_attention
from .compile_only import compile_only
from .embedding import embedding
from .latent_attention import latent_attention, store_latent
from .launch import set_pdl
from .linear import linear
from .moe import moe, prepare_experts
from .norm import layer_norm, rms_norm
from .prepare import prepare
from .rope import qk_norm_rope_store_kv
from .rope_decode_attention import max_rope_decodes, rope_decode_attention
from .sample import sample
from .slots import HostIds, SamplingState, TokenMasks
from .step import StepBuffers, prepare_step

__all__ = [
    "OPS",
    "HostIds",
    "SamplingState",
    "StepBuffers",
    "TokenMasks",
    "activation",
    "adjust_logits",
    "argmax",
    "compile_only",
    "embedding",
    "gated_activation",
    "latent_attention",
    "layer_norm",
    "linear",
    "max_rope_decodes",
    "moe",
    "paged_attention",
    "prepare",
    "prepare_experts",
    "prepare_step",
    "qk_norm_rope_store_kv",
    "rms_norm",
    "rope_decode_attention",
    "sample",
    "selected_logprobs",
    "set_pdl",
    "store_latent",
]

OPS = OpSet(
    prepare=prepare,
    prepare_experts=prepare_experts,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    activation=activation,
    gated_activation=gated_activation,
    qk_norm_rope_store_kv=qk_norm_rope_store_kv,
    paged_attention=paged_attention,
    store_latent=store_latent,
    latent_attention=latent_attention,
    fused_decode=FusedDecode(rope_decode_attention, max_rope_decodes),
)
