"""LoadedModel: a model in memory, on a device, with the types it computes in: given to a runner.

``load`` and ``load_pooling`` make one of an EngineConfig and a ModelSource: they choose the device,
the op set and the types, and build each rank's part of the model from the checkpoint. The KV cache
comes after that (sizing.py), when the runner knows how much memory its steps need.

Longer than other files: what is chosen before the first weight is read depends on each other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.checkpoints.dummy import DummyWeights
from octavo.checkpoints.gguf import GgufWeights
from octavo.checkpoints.kv_scales import is_kv_scale
from octavo.checkpoints.output_head import has_own_head
from octavo.checkpoints.placed import PlacedWeights
from octavo.checkpoints.quantize import QuantizedWeights
from octavo.checkpoints.read_ahead import ReadAhead
from octavo.checkpoints.safetensors import SafetensorsWeights, safetensors_files
from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.text_tensors import text_weights
from octavo.checkpoints.weights import Progress, Weights
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.kv_cache import LARGEST
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import ExpertBiases, Experts, Stored, Weight
from octavo.layers.ops import get_ops
from octavo.models.bert import ENCODERS
from octavo.models.config import ModelConfig
from octavo.models.pooling_model import PoolingModel
from octavo.models.registry import ARCHITECTURES, CausalLM, model_class
from octavo.models.source import ModelSource
from octavo.models.split import check_split
from octavo.models.stage import Stage, stages_of
from octavo.runner.devices import resolve_device, shard_devices
from octavo.runner.dtypes import DTYPES, KV_DTYPES, ModelDtypes, resolve_dtypes
from octavo.runner.lockstep import LockstepExchange
from octavo.runner.mesh import Exchange, Mesh, NoExchange, ranks_of

M = TypeVar("M")

# Gives a file's tensor of that name on the device; None: its bytes are in the page cache.
Take: TypeAlias = Callable[[Path, str], Tensor | None]

logger = logging.getLogger("octavo.loading")


@dataclass(frozen=True, slots=True, eq=False)
class ModelPart(Generic[M]):
    """One rank's part of a model; in a mesh of one, the whole."""

    rank: int
    device: torch.device
    model: M


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel(Generic[M]):
    """A model in memory, not yet able to step.

    ``shape``: of the whole model. ``mesh``: its shards; where a pipeline splits the layers, the
    last stage's, and ``earlier`` are the stages before, in order.
    """

    config: EngineConfig
    shape: ModelConfig
    dtypes: ModelDtypes
    mesh: Mesh[ModelPart[M]]
    earlier: tuple[Mesh[ModelPart[M]], ...] = ()

    @property
    def parts(self) -> list[ModelPart[M]]:
        """Of all stages."""
        return [part for mesh in (*self.earlier, self.mesh) for part in mesh.shards]

    @property
    def device(self) -> torch.device:
        """Rank 0's."""
        return self.mesh.lead.device

    @property
    def model(self) -> M:
        """Rank 0's part: the whole model in a mesh of one."""
        return self.mesh.lead.model

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return KV_DTYPES.get(self.config.kv_cache_dtype) or self.dtypes.kv_cache


def load(config: EngineConfig, source: ModelSource) -> LoadedModel[CausalLM]:
    """Read a model that generates text.

    Raises:
        ModelLoadError: the model cannot be read, or max_model_len is beyond its limit.
    """
    devices = shard_devices(config)
    shape = source.model_config
    dtypes = resolve_dtypes(config, shape, source, devices[0])
    ops = _open_ops(config, devices[0])
    if shape.latent is not None and devices[0].type != "cpu":
        _check_latent_cache(config.kv_cache_dtype)
    limit = _check_max_model_len(config.max_model_len, source)
    size = len(devices) // config.pipeline_parallel_size
    if len(devices) > 1:
        if shape.architecture not in ARCHITECTURES:
            raise ModelLoadError(
                f"{shape.architecture} runs through transformers' own module, which cannot be "
                "split: tensor_parallel_size and pipeline_parallel_size must be 1"
            )
        check_split(shape, size, whole_experts=config.enable_expert_parallel)
    left = Leftovers(len(devices))
    exchanges, builds = [], []
    with contextlib.ExitStack() as readers:
        for stage in stages_of(shape, config.pipeline_parallel_size):
            own_devices = devices[stage.index * size :][:size]
            exchange = _make_exchange(own_devices, shape.hidden_size * dtypes.activations.itemsize)
            exchanges.append(exchange)
            take = None
            if size > 1:
                take = readers.enter_context(
                    _read_ahead(source, own_devices[0], stage, shared=True)
                )
            for place, device in zip(ranks_of(exchange), own_devices, strict=True):
                rank = replace(place, whole_experts=config.enable_expert_parallel)
                build = functools.partial(
                    load_model,
                    source,
                    dtypes,
                    replace(ops, rank=rank),
                    max_model_len=limit,
                    device=device,
                    stage=stage,
                    left=left,
                    take=take,
                )
                builds.append((rank.rank, device, build))
        parts = _build_parts(builds)
    stages = [
        Mesh(parts[index * size :][:size], exchange) for index, exchange in enumerate(exchanges)
    ]
    return LoadedModel(config, shape, dtypes, stages[-1], tuple(stages[:-1]))


def _build_parts(
    builds: Sequence[tuple[int, torch.device, Callable[[], CausalLM]]],
) -> list[ModelPart[CausalLM]]:
    """The parts of all ranks and stages: of several devices at the same time."""

    def part(rank: int, device: torch.device, build: Callable[[], CausalLM]) -> ModelPart[CausalLM]:
        with _current(device):
            return ModelPart(rank, device, build())

    if len({device for _, device, _ in builds}) == 1:
        return [part(*build) for build in builds]
    with ThreadPoolExecutor(len(builds), thread_name_prefix="octavo-load") as threads:
        return list(threads.map(part, *zip(*builds, strict=True)))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on this device; a CPU needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def load_pooling(config: EngineConfig, source: ModelSource) -> LoadedModel[PoolingModel]:
    """Read a model that computes vectors or scores.

    Raises:
        ModelLoadError: the model cannot be read, or a setting that such models do not have.
    """
    if len(shard_devices(config)) > 1:
        raise ModelLoadError(
            "a pooling model cannot be split: tensor_parallel_size and pipeline_parallel_size must "
            "be 1"
        )
    device = resolve_device(config)
    ops = _open_ops(config, device)
    model = load_pooling_model(config, source, ops, device)
    act = model.act_dtype
    dtypes = ModelDtypes(act, act, packed=False, kv_cache=act)
    mesh = Mesh([ModelPart(0, device, model)], NoExchange())
    return LoadedModel(config, model.config, dtypes, mesh)


def _make_exchange(devices: Sequence[torch.device], row_bytes: int) -> Exchange:
    """The exchange between the shards of one stage."""
    if len(devices) == 1:
        return NoExchange()
    if devices[0].type == "cpu":
        return LockstepExchange(len(devices))
    # Imported here: Triton is not needed, and may be missing, on a CPU.
    from octavo.runner.peer_exchange import PeerExchange

    return PeerExchange(devices, row_bytes)


def _open_ops(config: EngineConfig, device: torch.device) -> OpSet:
    """The device's op set, on a CPU with its threads and the precision asked for."""
    ops = get_ops(device, config.attention_backend, config.cpu_activation_bits)
    if device.type == "cpu":
        _set_num_threads(ops, config.threads)
    return ops


def _check_latent_cache(kv_cache_dtype: str) -> None:
    """Raises ModelLoadError: a cache of bytes, which a GPU's latent attention does not read."""
    if KV_DTYPES.get(kv_cache_dtype) in LARGEST:
        raise ModelLoadError(
            f"kv_cache_dtype {kv_cache_dtype!r} is not supported with latent attention on a GPU: "
            "leave it at 'auto'"
        )


def _set_num_threads(ops: OpSet, asked: int | None) -> None:
    """Threads of the kernels: as many as asked for, else every core this process may use."""
    if asked is None:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        asked = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    if ops.threads is None:
        torch.set_num_threads(asked)
    else:
        ops.threads.resize(asked)
        # torch's threads spin for a while after each of its ops, on cores the kernels need.
        torch.set_num_threads(1)


def _check_max_model_len(max_model_len: int | None, source: ModelSource) -> int:
    """The most positions a request may reach."""
    model_config = source.model_config
    limit = model_config.max_context_len
    if max_model_len in (None, -1):
        return limit
    assert max_model_len is not None
    limit = model_config.context_limit
    if max_model_len > limit:
        raise ModelLoadError(f"max_model_len {max_model_len} is beyond the model's own {limit}")
    return max_model_len


def load_model(
    source: ModelSource,
    dtypes: ModelDtypes,
    ops: OpSet,
    *,
    max_model_len: int,
    device: torch.device,
    stage: Stage | None = None,
    left: Leftovers | None = None,
    take: Take | None = None,
) -> CausalLM:
    """Build the model with its weights on ``device``; shows a progress bar on a terminal.

    ``max_model_len``: positions the rotary table covers. ``stage``: the part of a pipeline to
    build; None: all. ``left``: shared by all parts of a model. ``take``: of who reads the files
    ahead for all shards; None: this one reads them itself.

    Raises:
        ModelLoadError: an unknown architecture; a tensor that is missing, left over, misshapen or
            of an unknown type; a file that is cut short.
    """
    model_config = source.model_config
    if model_config.architecture not in ARCHITECTURES:
        return _load_foreign(source, model_config, dtypes, ops, max_model_len, device)
    if model_config.tie_word_embeddings and source.kind == "safetensors":
        is_tied = not has_own_head(safetensors_files(source.path))
        model_config = model_config.replace(tie_word_embeddings=is_tied)
    build = model_class(model_config.architecture)
    if dtypes.exact:
        ops = ops.exactly()
    counter = _WeightCounter(ops)
    with (
        _read_ahead(source, device, stage)
        if take is None
        else contextlib.nullcontext(take) as taken,
        _progress_bar(source) as progress,
        torch.inference_mode(),
    ):
        weights = _open_weights(source, model_config, dtypes, device, progress, taken)
        if dtypes.quantize is not None:
            weights = QuantizedWeights(weights, dtypes.quantize)
        try:
            model = build(
                model_config,
                weights,
                counter.ops,
                max_model_len=max_model_len,
                device=device,
                stage=stage,
            )
        except KeyError as error:
            raise ModelLoadError(f"{source.path}: no tensor for {error.args[0]}") from error
        _tell_of_kv_scales(source, weights, dtypes)
        others = {name for name in weights.unread() if name.startswith(build.other_parts)}
        if others:
            logger.info("%s: %d tensors are not of the text model", source.path, len(others))
        (left or Leftovers()).finish(weights, others=others)
    model.num_weights = counter.total
    return model


def _tell_of_kv_scales(source: ModelSource, weights: Weights, dtypes: ModelDtypes) -> None:
    """A line in the log where static scales of keys and values are left unread."""
    left = sum(is_kv_scale(name) for name in weights.unread())
    if left:
        reason = (
            "this model computes each row's" if dtypes.kv_scales else "a cache of fp8 takes them"
        )
        logger.warning(
            "%s: %d static scales of keys and values are not used: %s", source.path, left, reason
        )


def load_pooling_model(
    config: EngineConfig, source: ModelSource, ops: OpSet, device: torch.device
) -> PoolingModel:
    """A model that computes vectors or scores, with its weights on ``device``.

    On a CPU an encoder's weights are float32 unless another type was asked for; a decoder's are
    large, and stay in their file's form.

    Raises:
        ModelLoadError: the model cannot be read, or is to be quantized.
    """
    if config.quantization is not None and not source.is_quantized_as(config.quantization):
        raise ModelLoadError(f"{source.path}: a model for embeddings cannot be quantized")
    shape = source.model_config
    asked = dtype = DTYPES.get(config.dtype)
    on_cpu = device.type == "cpu"
    if dtype is None and not on_cpu:
        dtype = DTYPES.get(shape.dtype, torch.float32)
    elif dtype is None and shape.architecture in ENCODERS:
        dtype = torch.float32
    return PoolingModel(
        source,
        ops,
        device,
        dtype=dtype,
        act_dtype=torch.float32 if on_cpu or dtype is None else dtype,
        rounded=asked is not torch.float32,
        max_model_len=None if config.max_model_len == -1 else config.max_model_len,
    )


class Leftovers:
    """Tensors of a checkpoint that none of a model's ``num_parts`` parts has read so far."""

    def __init__(self, num_parts: int = 1) -> None:
        self._names: set[str] | None = None
        self._num_missing = num_parts
        self._lock = threading.Lock()

    def finish(self, weights: Weights, *, others: AbstractSet[str] = frozenset()) -> None:
        """End a part's reading, on whatever thread. ``others``: tensors that no part reads.

        Raises:
            ModelLoadError: it is the last, and no part has a use for some tensor.
        """
        unread = weights.unread()
        with self._lock:
            self._names = unread if self._names is None else self._names & unread
            self._num_missing -= 1
            left = self._names if self._num_missing == 0 else frozenset()
        weights.finish(unread - (left - others))


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
        self,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        *,
        biases: ExpertBiases | None = None,
        exact: bool = False,
    ) -> Experts:
        experts = self._prepare_experts(gate_up, down, biases=biases, exact=exact)
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
    take: Take | None,
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
            weights = GgufWeights(
                source.gguf,
                heads=(model_config.num_heads, model_config.num_kv_heads),
                device=device,
                dtype=dtypes.weights,
                act_dtype=act,
                packed=dtypes.packed,
                unpacked=torch.float32 if dtypes.exact else torch.bfloat16,
                progress=progress,
            )
            if dtypes.packed and device.type != "cpu":
                assert dtypes.weights is not None
                return PlacedWeights(weights, device, dtypes.weights)
            return weights
        case "safetensors":
            files = SafetensorsWeights(
                safetensors_files(source.path),
                device=device,
                dtype=dtypes.weights,
                act_dtype=act,
                scheme=source.scheme,
                ignored=["lm_head.weight"] if model_config.tie_word_embeddings else [],
                progress=progress,
                take=take,
                kv_scales=dtypes.kv_scales,
            )
            return text_weights(files, str(source.path), model_config.is_part)


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
    source: ModelSource, device: torch.device, stage: Stage | None = None, *, shared: bool = False
) -> Iterator[Take | None]:
    """A function that hands out tensors read ahead of their use, where that pays: for a GPU.

    Other stages' layers are not read. ``shared``: by several shards, which take their parts out of
    the page cache. A CPU has no cores to spare, and its weights stay mapped.
    """
    if device.type == "cpu" or source.kind != "safetensors":
        yield None
        return
    files = safetensors_files(source.path)
    reads = stage.reads if stage is not None else lambda name: True
    with ReadAhead(files, None if shared else device, is_wanted=reads) as ahead:
        yield ahead.take
