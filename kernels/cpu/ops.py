"""The op set on a CPU, and the threads it runs on. Semantics: ``reference``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from octavo import _core

from ..opset import OpSet, ThreadPool
from ..reference import sample, store_latent
from .attention import latent_attention, paged_attention, qk_norm_rope_store_kv
from .decoder import make_decoder
from .elementwise import activation, gated_activation, layer_norm, rms_norm
from .encoder import make_encoder
from .linear import prepare, prepare_experts
from .logits import argmax, mask_logits_, selected_logprobs
from .recurrent import RECURRENT_OPS

__all__ = [
    "OPS",
    "activation",
    "argmax",
    "gated_activation",
    "latent_attention",
    "layer_norm",
    "level",
    "make_decoder",
    "make_encoder",
    "mask_logits_",
    "num_threads",
    "paged_attention",
    "prepare",
    "prepare_experts",
    "qk_norm_rope_store_kv",
    "rms_norm",
    "sample",
    "selected_logprobs",
    "set_num_threads",
    "store_latent",
]


def set_num_threads(n: int) -> None:
    """Use n threads, the caller included; 0: every core this process may use.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"threads must not be negative, not {n}")
    _core.cpu_set_num_threads(n)


def num_threads() -> int:
    """Threads the kernels use."""
    return _core.cpu_num_threads()


def level() -> str:
    """The instruction set in use, a level of `cpu_levels` (OCTAVO_CPU_LEVEL overrides)."""
    return _core.cpu_level()


def with_activation_bits(bits: int) -> OpSet:
    """The op set whose quantized weights meet activations of so many bits: see ``CpuWeight``."""
    return replace(
        OPS,
        prepare=partial(prepare, activation_bits=bits),
        prepare_experts=partial(prepare_experts, activation_bits=bits),
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
    make_decoder=make_decoder,
    make_encoder=make_encoder,
    threads=ThreadPool(set_num_threads, num_threads),
)
