"""The op set in Triton, for CUDA devices; on CPU tensors only with TRITON_INTERPRET=1.

Everything here can be captured into a CUDA graph.
"""

from __future__ import annotations

from ..opset import FusedDecode, OpSet
from ..recurrent import RecurrentOps
from ..reference import argmax, selected_logprobs
from .activation import activation, gated_activation
from .adjust_logits import adjust_logits
from .attention import paged_attention
from .causal_conv import causal_conv, short_conv
from .compile_only import compile_only
from .embedding import embedding
from .gated_delta_rule import gated_delta_rule
from .gated_norm import copy_rows, gated_norm
from .latent_attention import latent_attention, store_latent
from .launch import set_pdl
from .linear import linear
from .moe import moe, prepare_experts
from .norm import layer_norm, rms_norm
from .prepare import prepare
from .rope import qk_norm_rope_store_kv
from .rope_decode_attention import max_rope_decodes, rope_decode_attention
from .sample import sample
from .selective_scan import selective_scan
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

RECURRENT_OPS = RecurrentOps(
    causal_conv=causal_conv,
    short_conv=short_conv,
    gated_delta_rule=gated_delta_rule,
    selective_scan=selective_scan,
    gated_norm=gated_norm,
    copy_rows=copy_rows,
)

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
    recurrent=RECURRENT_OPS,
    fused_decode=FusedDecode(rope_decode_attention, max_rope_decodes),
)
