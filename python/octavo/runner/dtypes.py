"""ModelDtypes: the types a model computes in, by what is asked for, its files and its device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.config import ModelConfig
from octavo.models.source import ModelSource

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# --kv-cache-dtype -> the type of keys and values; those of a byte have a scale a head's row.
KV_DTYPES = DTYPES | {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_per_token_head": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int8_per_token_head": torch.int8,
}

# Names of a cache whose scales are the checkpoint's own, where it has them.
_STATIC_KV = ("fp8", "fp8_e4m3")

# --quantization -> the rounding of float matrices, by the kernels that there are for it.
_QUANTIZATIONS = {
    "mxfp4": "MXFP4",
    # A scale a row costs no more than one in all, and loses less.
    "fp8": "FP8 by channel",
    "fp8_per_channel": "FP8 by channel",
    "fp8_per_tensor": "FP8 by tensor",
    "fp8_per_block": "FP8 by block",
}
CPU_QUANTIZATIONS = {"w4": "Q4_1", "w8": "Q8_0", **_QUANTIZATIONS}
GPU_QUANTIZATIONS = {"w4": "INT4", "w8": "INT8", **_QUANTIZATIONS}


@dataclass(frozen=True)
class ModelDtypes:
    """The dtypes of a model in memory.

    ``weights``: of matrices, None where each keeps the form it has in the file. ``activations``:
    of everything that flows. ``packed``: quantized matrices stay quantized. ``exact``: and are
    multiplied with float activations, never with rounded ones. ``kv_cache``: of keys and values
    where nothing else is asked for. ``quantize``: the rounding of float matrices, in
    checkpoints.quantize.ROUNDINGS. ``kv_scales``: the cache takes the checkpoint's static scales.
    """

    weights: torch.dtype | None
    activations: torch.dtype
    packed: bool
    kv_cache: torch.dtype
    exact: bool = False
    quantize: str | None = None
    kv_scales: bool = False


def resolve_dtypes(
    config: EngineConfig, model_config: ModelConfig, source: ModelSource, device: torch.device
) -> ModelDtypes:
    """The meaning of ``--dtype`` for this model on this device.

    On a GPU, weights and activations share one type: the one asked for, else the checkpoint's,
    else (a GGUF file) bfloat16; quantized matrices stay so where there are kernels for them, and
    are dequantized to it otherwise, as they are for float32. On a CPU activations are
    float32, whatever the weights: ``auto`` leaves each weight in its file's form, packed where
    quantized, with the fastest arithmetic the kernels have for it; ``float32`` is exact float32
    arithmetic (quantized weights stay packed where the kernels offer that, else are dequantized);
    ``bfloat16`` and ``float16`` round float weights, and a GGUF file's, to that type. Keys and
    values are bfloat16 unless float32 was asked for, and on a GPU e4m3 where
    the checkpoint's config has them so. ``--quantization`` rounds float matrices as
    they are read, or only names what the files are.

    Raises:
        ModelLoadError: a quantization that this device has no kernels for.
    """
    found = _weights_and_activations(config, model_config, source, device)
    kv_cache = config.kv_cache_dtype
    is_plain = device.type != "cpu" and model_config.latent is None
    if kv_cache == "auto" and is_plain and source.has_fp8_cache:
        return replace(found, kv_cache=torch.float8_e4m3fn, kv_scales=True)
    return replace(found, kv_scales=kv_cache in _STATIC_KV)


def _weights_and_activations(
    config: EngineConfig, model_config: ModelConfig, source: ModelSource, device: torch.device
) -> ModelDtypes:
    asked = DTYPES.get(config.dtype)
    native = config.attention_backend != "reference"
    quantize = _find_rounding(config, source, device)
    if device.type != "cpu":
        dtype = asked or DTYPES.get(model_config.dtype, torch.bfloat16)
        packed = source.kind == "gguf"
        return ModelDtypes(dtype, dtype, packed=packed, kv_cache=dtype, quantize=quantize)
    exact = asked is torch.float32
    kv_cache = torch.bfloat16 if native and not exact else torch.float32
    if source.kind == "gguf" and native and asked in (None, torch.float32):
        return ModelDtypes(None, torch.float32, True, kv_cache, exact, quantize)
    if asked is None and source.kind == "dummy":
        asked = DTYPES.get(model_config.dtype, torch.bfloat16)
    if not native:
        asked = asked or torch.float32
    return ModelDtypes(asked, torch.float32, False, kv_cache, exact, quantize)


def _find_rounding(config: EngineConfig, source: ModelSource, device: torch.device) -> str | None:
    """The rounding that ``--quantization`` asks for; None: none, or the checkpoint's own method.

    Raises:
        ModelLoadError: another method than the checkpoint's, or no kernels for it here.
    """
    asked = config.quantization
    if asked is None or source.is_quantized_as(asked):
        return None
    native = config.attention_backend != "reference"
    known = (CPU_QUANTIZATIONS if native else {}) if device.type == "cpu" else GPU_QUANTIZATIONS
    if asked not in known:
        raise ModelLoadError(
            f"quantization {asked!r} is not supported; known: {', '.join(CPU_QUANTIZATIONS)}"
            if native
            else "quantization is not supported with attention_backend 'reference' on a CPU"
        )
    return known[asked]
