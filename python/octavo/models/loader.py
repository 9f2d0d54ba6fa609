"""Loading a model: dtypes, weights, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.checkpoints.dummy import DummyWeights
from octavo.checkpoints.gguf import GgufWeights
from octavo.checkpoints.quantize import QuantizedWeights
from octavo.checkpoints.read_ahead import ReadAhead
from octavo.checkpoints.safetensors import SafetensorsWeights, safetensors_files
from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.weights import Progress, Weights
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import Experts, Stored, Weight
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
    """The dtypes of a model in memory.

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
    """The meaning of ``--dtype`` for this model on this device.

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
    ops: OpSet,
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
    build = model_class(model_config.architecture)
    if dtypes.exact:
        ops = ops.exactly()
    counter = _WeightCounter(ops)
    with (
        _read_ahead(source, device) as take,
        _progress_bar(source) as progress,
        torch.inference_mode(),
    ):
        weights = _open_weights(source, model_config, dtypes, device, progress, take)
        if dtypes.quantize is not None:
            weights = QuantizedWeights(weights, dtypes.quantize)
        try:
            model = build(
                model_config, weights, counter.ops, max_model_len=max_model_len, device=device
            )
        except KeyError as error:
            raise ModelLoadError(f"{source.path}: no tensor for {error.args[0]}") from error
        weights.finish()
    model.num_weights = counter.total
    return model


class _WeightCounter:
    """Adds up the elements of all weights that ``ops`` prepares."""

    def __init__(self, ops: OpSet) -> None:
        self.total = 0
        self._prepare, self._prepare_experts = ops.prepare, ops.prepare_experts
        self.ops = replace(ops, prepare=self._count, prepare_experts=self._count_experts)

    def _count(self, parts: Sequence[Stored], *, exact: bool = False) -> Weight:
        weight = self._prepare(parts, exact=exact)
        self.total += weight.num_elements
        return weight

    def _count_experts(
        self, gate_up: Sequence[Sequence[Stored]], down: Sequence[Stored], *, exact: bool = False
    ) -> Experts:
        experts = self._prepare_experts(gate_up, down, exact=exact)
        self.total += experts.num_elements
        return experts


def _load_foreign(
    source: ModelSource,
    model_config: ModelConfig,
    dtypes: ModelDtypes,
    ops: OpSet,
    max_model_len: int,
    device: torch.device,
) -> CausalLM:
    """A model without a native implementation: transformers' module. Its import takes a second."""
    from octavo.models.fallback import TransformersModel

    if source.kind == "safetensors" and not isinstance(source.scheme, DenseScheme):
        raise ModelLoadError(
            f"{source.path}: architecture {model_config.architecture!r} is not supported quantized"
        )
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
                progress=progress,
            )
        case "safetensors":
            return SafetensorsWeights(
                safetensors_files(source.path),
                device=device,
                dtype=dtypes.weights,
                act_dtype=act,
                scheme=source.scheme,
                ignored=["lm_head.weight"] if model_config.tie_word_embeddings else [],
                progress=progress,
                take=take,
            )


@contextlib.contextmanager
def _progress_bar(source: ModelSource) -> Iterator[Progress]:
    files: list[Path] = []
    if source.kind == "gguf":
        files = [source.path]
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
    """A function that hands out tensors read ahead, for a GPU; None for a CPU.

    A CPU has no cores to spare, and its mapped files stay mapped.
    """
    if device.type == "cpu" or source.kind != "safetensors":
        yield None
        return
    with ReadAhead(safetensors_files(source.path), device) as ahead:
        yield ahead.take
