"""Static scales of keys and values, which tools that calibrate store beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.schemes.scheme import Tensors
from octavo.errors import ModelLoadError

# Of an attention's keys and of its values, from newer names to older ones, after its prefix.
_NAMES = (
    (".k_scale", ".v_scale"),
    (".k_proj.k_scale", ".v_proj.v_scale"),
    (".attn.k_scale", ".attn.v_scale"),
    (".k_proj.output_scale", ".v_proj.output_scale"),
    # One of both, as the first such files have it.
    (".kv_scale", ".kv_scale"),
)
_ENDS = tuple({name for names in _NAMES for name in names})


def has_fp8_cache(quantization_config: Mapping[str, Any]) -> bool:
    """True where a ``quantization_config`` has keys and values in 8-bit floats: compressed-tensors'
    ``kv_cache_scheme``, ModelOpt's ``kv_cache_quant_algo``."""
    scheme = quantization_config.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        bits, kind = scheme.get("num_bits", 8), scheme.get("type", "float")
        return bool(bits == 8 and kind == "float")
    return str(quantization_config.get("kv_cache_quant_algo") or "").upper() == "FP8"


def is_kv_scale(name: str) -> bool:
    """True for a tensor of such scales."""
    return name.endswith(_ENDS)


def read_kv_scales(tensors: Tensors, prefix: str, num_kv_heads: int) -> Tensor | None:
    """float32 [2, num_kv_heads], of the attention ``prefix``'s keys and values; None: not stored.

    They multiply what the cache holds. A file has one for all heads, or one a head.

    Raises:
        ModelLoadError: another number of them, or one that is not positive.
    """
    for names in _NAMES:
        own = [prefix + name for name in names]
        if all(name in tensors for name in own):
            return torch.stack([_read(tensors, name, num_kv_heads) for name in own])
    return None


def _read(tensors: Tensors, name: str, num_kv_heads: int) -> Tensor:
    scales = tensors.read(name, tensors.shape(name)).float().flatten()
    if scales.numel() not in (1, num_kv_heads):
        raise ModelLoadError(f"tensor {name} holds {scales.numel()} scales of {num_kv_heads} heads")
    if not bool((scales > 0).all()):
        raise ModelLoadError(f"tensor {name} holds a scale that is not positive")
    return scales.expand(num_kv_heads)
