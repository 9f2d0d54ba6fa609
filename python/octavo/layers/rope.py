"""Rotary position embedding: the table of cosines and sines, for each kind of scaling.

Frequencies are those of transformers' ``modeling_rope_utils``; tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """A rotary embedding's dimensions and frequencies.

    ``rot_dim``: number of a head's dimensions that rotate (all of them unless partial).
    ``scaling``: the keys of HF's ``rope_scaling``, without ``rope_type``. ``freq_factors``,
    rot_dim / 2 long, divide the frequencies: the form of Llama 3's scaling in GGUF files.
    """

    theta: float
    rot_dim: int
    rope_type: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    freq_factors: tuple[float, ...] = ()


def rope_frequencies(
    rope: RopeConfig, max_position_embeddings: int, seq_len: int | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each rotating pair, and the factor on cosines and sines.

    ``seq_len``, the longest sequence served, matters to ``dynamic`` and ``longrope`` alone: beyond
    their training length they rotate all positions differently. (transformers chooses again in each
    forward pass; a cache of rotated keys must choose once.)

    Returns:
        float32 [rot_dim / 2] on the CPU, and a number.

    Raises:
        ValueError: an unknown rope_type, or one whose parameters are missing.
    """
    dim, theta = rope.rot_dim, rope.theta
    scaling: dict[str, Any] = dict(rope.scaling)
    factor = 1.0
    try:
        match rope.rope_type:
            case "default":
                inv_freq = _inverse_frequencies(theta, dim)
            case "linear":
                inv_freq = _inverse_frequencies(theta, dim) / scaling["factor"]
            case "dynamic":
                stretch = max(seq_len or 0, max_position_embeddings) / max_position_embeddings
                grow = scaling["factor"] * stretch - (scaling["factor"] - 1)
                inv_freq = _inverse_frequencies(theta * grow ** (dim / (dim - 2)), dim)
            case "proportional":
                # All of a head's pairs turn, the last of them by nothing.
                inv_freq = _inverse_frequencies(theta, dim) / scaling.get("factor", 1.0)
                turned = int(scaling.get("partial_rotary_factor", 1.0) * dim // 2)
                inv_freq = torch.where(torch.arange(dim // 2) < turned, inv_freq, 0.0)
            case "llama3":
                inv_freq = _llama3(_inverse_frequencies(theta, dim), scaling)
            case "yarn":
                inv_freq, factor = _yarn(theta, dim, scaling, max_position_embeddings)
            case "longrope":
                inv_freq, factor = _longrope(theta, dim, scaling, max_position_embeddings, seq_len)
            case other:
                raise ValueError(f"rope_type {other!r} is not supported")
    except KeyError as missing:
        raise ValueError(f"rope_type {rope.rope_type!r} needs {missing.args[0]!r}") from None
    if rope.freq_factors:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float32)
    return inv_freq, factor


def cos_sin_table(
    rope: RopeConfig,
    max_position_embeddings: int,
    max_model_len: int,
    device: torch.device,
) -> Tensor:
    """float32 [max_model_len, rot_dim]: cosines in the first half of a row, sines in the second."""
    inv_freq, factor = rope_frequencies(rope, max_position_embeddings, max_model_len)
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = positions[:, None] * inv_freq[None, :]
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)


def identity_table(max_model_len: int, device: torch.device) -> Tensor:
    """float32 [max_model_len, 2]: the identity rotation, for layers without a rotary embedding."""
    return torch.tensor([[1.0, 0.0]]).repeat(max_model_len, 1).to(device)


def _inverse_frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _llama3(inv_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelen = 2 * math.pi / inv_freq
    smooth = (original / wavelen - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelen > original / low, inv_freq / factor, between)
    return torch.where(wavelen < original / high, inv_freq, scaled)


def _longrope(
    theta: float,
    dim: int,
    scaling: dict[str, Any],
    max_position_embeddings: int,
    seq_len: int | None,
) -> tuple[Tensor, float]:
    """A factor for every pair, one list for short contexts and one for long (arXiv 2402.13753)."""
    original = scaling["original_max_position_embeddings"]
    short, long = scaling["short_factor"], scaling["long_factor"]
    factors = long if seq_len is not None and seq_len > original else short
    if len(factors) != dim // 2:
        raise ValueError(f"rope_type 'longrope' has {len(factors)} factors for {dim // 2} pairs")
    stretch = scaling.get("factor") or max_position_embeddings / original
    attention = scaling.get("attention_factor")
    if attention is None:
        grown = 1 + math.log(stretch) / math.log(original) if stretch > 1 else 1.0
        attention = math.sqrt(grown)
    inv_freq = _inverse_frequencies(theta, dim) / torch.tensor(factors, dtype=torch.float32)
    return inv_freq, float(attention)


def _yarn(
    theta: float, dim: int, scaling: dict[str, Any], max_position_embeddings: int
) -> tuple[Tensor, float]:
    """Fast dimensions extrapolate, slow ones interpolate, a ramp between (arXiv 2309.00071)."""
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_position_embeddings / original

    def attention_factor(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = scaling.get("attention_factor")
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if given is not None:
        attention = float(given)
    elif mscale and mscale_all:
        attention = attention_factor(mscale) / attention_factor(mscale_all)
    else:
        attention = attention_factor()

    def dimension_of(rotations: float) -> float:
        """The dimension that makes this many rotations over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = _inverse_frequencies(theta, dim)
    return extrapolated / factor * ramp + extrapolated * (1 - ramp), attention
