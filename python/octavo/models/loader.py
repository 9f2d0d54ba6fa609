"""From a ModelSource to a model in memory: types, weights, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.checkpoints.output_head import has_own_head
from octavo.checkpoints.quantize import QuantizedWeights
from octavo.checkpoints.read_ahead import ReadAhead
from octavo.checkpoints.weights import (
    DummyWeights,
    GgufWeights,
    Progress,
    SafetensorsWeights,
    Weights,
    safetensors_files,
)
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.layers.ops import Ops
from octavo.models.config import ModelConfig
from octavo.models.registry import ARCHITECTURES, CausalLM, model_class
from octavo.models.source import ModelSource, load_tokenizer, resolve_model

__all__ = ["ModelDtypes", "load_model", "load_tokenizer", "resolve_dtypes", "resolve_model"]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# --quantization -> what float matrices are rounded to, per group of 32 along K.
QUANTIZATIONS = {"w4": "Q4_1", "w8": "Q8_0"}


@dataclass(frozen=True)
class ModelDtypes:
    """How numbers are held.

    ``weights``: of matrices, None where each keeps the form it has in the file. ``activations``:
    of everything that flows. ``packed``: quantized matrices stay quantized. ``exact``: and are
    multiplied with float activations, never with rounded ones. ``kv_cache``: of keys and values
    where nothing else is asked for. ``quantize``: GGUF kind that float matrices are rounded to.
    """

    weights: torch.dtype | None
    activations: torch.dtype
    packed: bool
    kv_cache: torch.dtype
    exact: bool = False
    quantize: str | None = None


def resolve_dtypes(
    config: EngineConfig, model_config: ModelConfig, source: ModelSource, device: torch.device
) -> ModelDtypes:
    """What ``--dtype`` means for this model on this device.

    On a GPU, weights and activations share one type: the one asked for, else the checkpoint's,
    else (a GGUF file) bfloat16; quantized files are dequantized to it. On a CPU activations are
    float32, whatever the weights: ``auto`` leaves each weight in its file's form, packed where
    quantized, with the fastest arithmetic the kernels have for it; ``float32`` is exact float32
    arithmetic (quantized weights stay packed where the kernels offer that, else are dequantized);
    ``bfloat16`` and ``float16`` round weights to that type. Keys and values are bfloat16 unless
    float32 was asked for. ``--quantization`` rounds float matrices as they are read.

    Raises:
        ModelLoadError: a quantization that this device has no kernels for.
    """
    asked = DTYPES.get(config.dtype)
    native = config.attention_backend != "reference"
    quantize = None
    if config.quantization is not None:
        quantize = QUANTIZATIONS.get(config.quantization)
        if quantize is None or device.type != "cpu" or not native:
            known = ", ".join(QUANTIZATIONS) + " (on a CPU)"
            raise ModelLoadError(
                f"quantization {config.quantization!r} is not supported; known: {known}"
            )
    if device.type != "cpu":
        dtype = asked or DTYPES.get(model_config.dtype, torch.bfloat16)
        return ModelDtypes(dtype, dtype, packed=False, kv_cache=dtype)
    exact = asked is torch.float32
    kv_cache = torch.bfloat16 if native and not exact else torch.float32
    if source.kind == "gguf" and native and asked in (None, torch.float32):
        return ModelDtypes(None, torch.float32, True, kv_cache, exact, quantize)
    if asked is None and source.kind == "dummy":
        asked = DTYPES.get(model_config.dtype, torch.bfloat16)
    if not native:
        asked = asked or torch.float32
    return ModelDtypes(asked, torch.float32, False, kv_cache, exact and bool(quantize), quantize)


def load_model(
    config: EngineConfig,
    source: ModelSource,
    model_config: ModelConfig,
    dtypes: ModelDtypes,
    ops: Ops,
    *,
    max_model_len: int,
    device: torch.device,
) -> CausalLM:
    """Build the model with its weights on ``device``; shows a progress bar on a terminal.

    ``max_model_len``: positions the rotary table covers.

    Raises:
        ModelLoadError: an unknown architecture; a tensor that is missing, left over, misshapen or
            of an unknown type; a file that is cut short.
    """
    if model_config.architecture not in ARCHITECTURES:
        return _load_foreign(source, model_config, dtypes, ops, max_model_len, device)
    if model_config.tie_word_embeddings and source.kind == "safetensors":
        is_tied = not has_own_head(safetensors_files(source.path))
        model_config = model_config.replace(tie_word_embeddings=is_tied)
    build = model_class(model_config.architecture)
    with (
        _read_ahead(source, device) as take,
        _progress_bar(source) as progress,
        torch.inference_mode(),
    ):
        weights = _open_weights(source, model_config, dtypes, device, progress, take)
        if dtypes.quantize is not None:
            weights = QuantizedWeights(weights, dtypes.quantize, exact=dtypes.exact)
        try:
            model = build(model_config, weights, ops, max_model_len=max_model_len, device=device)
        except KeyError as error:
            raise ModelLoadError(f"{source.path}: no tensor for {error.args[0]}") from error
        weights.finish()
    return model


def _load_foreign(
    source: ModelSource,
    model_config: ModelConfig,
    dtypes: ModelDtypes,
    ops: Ops,
    max_model_len: int,
    device: torch.device,
) -> CausalLM:
    """A model of no family here: transformers' module. The import takes a second."""
    from octavo.models.fallback import TransformersModel

    if dtypes.quantize is not None:
        raise ModelLoadError(
            f"{source.path}: architecture {model_config.architecture!r} cannot be quantized"
        )
    with torch.inference_mode():
        return TransformersModel(
            model_config,
            None if source.kind == "dummy" else source.folder,
            ops,
            dtype=dtypes.activations,
            max_model_len=max_model_len,
            device=device,
        )


def _open_weights(
    source: ModelSource,
    model_config: ModelConfig,
    dtypes: ModelDtypes,
    device: torch.device,
    progress: Progress,
    take: Callable[[Path, str], Tensor] | None,
) -> Weights:
    act = dtypes.activations
    match source.kind:
        case "dummy":
            assert dtypes.weights is not None
            return DummyWeights(
                device=device, dtype=dtypes.weights, act_dtype=act, progress=progress
            )
        case "gguf":
            assert source.gguf is not None
            return GgufWeights(
                source.gguf,
                heads=(model_config.num_heads, model_config.num_kv_heads),
                device=device,
                dtype=dtypes.weights,
                act_dtype=act,
                packed=dtypes.packed,
                exact=dtypes.exact,
                progress=progress,
            )
        case "safetensors":
            return SafetensorsWeights(
                safetensors_files(source.path),
                device=device,
                dtype=dtypes.weights,
                act_dtype=act,
                ignored=["lm_head.weight"] if model_config.tie_word_embeddings else [],
                progress=progress,
                take=take,
            )


@contextlib.contextmanager
def _progress_bar(source: ModelSource) -> Iterator[Progress]:
    files: list[Path] = []
    if source.kind == "gguf":
        files = source.gguf_files
    elif source.kind == "safetensors":
        files = safetensors_files(source.path)
    total = sum(file.stat().st_size for file in files) or None
    with tqdm(
        desc="loading weights",
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None,  # shown on a terminal only
        leave=False,
    ) as bar:
        yield bar.update


@contextlib.contextmanager
def _read_ahead(
    source: ModelSource, device: torch.device
) -> Iterator[Callable[[Path, str], Tensor] | None]:
    """What hands out tensors that are read ahead, where that pays: for a GPU.

    A CPU has no cores to spare, and what it maps stays mapped.
    """
    if device.type == "cpu" or source.kind != "safetensors":
        yield None
        return
    with ReadAhead(safetensors_files(source.path), device) as ahead:
        yield ahead.take
