"""ModelRunner: the model in memory, its KV cache, and one step from plan to tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo._core import Staging
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.context import AttentionContext
from octavo.layers.ops import get_ops
from octavo.models.loader import DTYPES, load_model, resolve_dtypes
from octavo.models.source import ModelSource
from octavo.pooling import PoolingInfo
from octavo.runner.host_memory import available_cpu_bytes, limit_heaps
from octavo.runner.input_batch import InputBatch, StagingBuffer
from octavo.runner.kv_cache import (
    DEFAULT_CPU_KV_BYTES,
    MAX_CPU_MEMORY_FRACTION,
    allocate_kv_cache,
    plan_kv_cache,
)
from octavo.runner.library_pages import drop_library_pages
from octavo.runner.prompt_scorer import PromptScorer
from octavo.runner.request_state import RequestState
from octavo.runner.sampler import SampledTokens, Sampler

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch

__all__ = ["ComputedStep", "InFlight", "ModelRunner", "RequestState", "SampledTokens"]


@dataclass(slots=True, eq=False)
class InFlight:
    """A launched step, for ``collect``."""

    step_id: int


@dataclass(slots=True, eq=False)
class ComputedStep(InFlight):
    """A step whose tokens are known already."""

    sampled: SampledTokens


class ModelRunner:
    """Computes steps, one after another.

    ``launch`` computes at once here, and samples on the host. GpuRunner runs ahead; loading, sizing
    and staging are these.

    Raises:
        ModelLoadError: the model, or one request of max_model_len, does not fit or cannot be read.
    """

    max_in_flight = 1
    keeps_kv = True
    # What a model has that gives vectors in place of text.
    pooling: PoolingInfo | None = None

    def __init__(self, config: EngineConfig, source: ModelSource) -> None:
        self.config = config
        self.device = resolve_device(config)
        on_cpu = self.device.type == "cpu"
        model_config = source.model_config
        dtypes = resolve_dtypes(config, model_config, source, self.device)
        ops = get_ops(self.device, config.attention_backend)
        if on_cpu:
            limit_heaps()
            set_num_threads(ops, config.threads)
        limit = _check_max_model_len(config.max_model_len, source)
        self.model = load_model(
            config, source, model_config, dtypes, ops, max_model_len=limit, device=self.device
        )
        self._act_dtype = dtypes.activations
        self.max_num_seqs: int = config.max_num_seqs or (64 if on_cpu else 256)
        kv_dtype = DTYPES.get(config.kv_cache_dtype) or dtypes.kv_cache
        available = self._available_bytes()
        self._plan = plan_kv_cache(
            model_config,
            kv_dtype,
            block_size=config.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=config.max_model_len,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            default_bytes=DEFAULT_CPU_KV_BYTES if on_cpu else available,
            available_bytes=available,
        )
        self.num_blocks = self._plan.num_blocks
        self.block_size = self._plan.block_size
        self.max_model_len = self._plan.max_model_len
        self.max_num_batched_tokens = self._batched_tokens(2048 if on_cpu else 8192)
        self.kv_caches = allocate_kv_cache(self._plan, model_config, kv_dtype, self.device)
        self.model.bind_kv_cache(self.kv_caches)
        self.prompt_scorer = PromptScorer(self.model.compute_logits, model_config.vocab_size)
        self._make_buffers(-(-self.max_model_len // self.block_size))

    def _make_buffers(self, max_blocks_per_seq: int) -> None:
        """What a step is staged in and sampled with, once all sizes are known."""
        self.sampler = Sampler(self.max_num_seqs, self.config.seed)
        self.batch = InputBatch(self.max_num_seqs, max_blocks_per_seq, self.device)
        self._stagings = [self._new_staging_buffer() for _ in range(self.max_in_flight)]
        self._next_staging = 0
        if self.device.type != "cpu":
            self._packed = torch.zeros_like(self._stagings[0].host, device=self.device)

    # ---------------------------------------------------------------------------------- steps

    def new_staging(self) -> Staging:
        """A staging area of its own, outside the rotation."""
        self._stagings.append(self._new_staging_buffer())
        return self._stagings[-1].staging

    def next_staging(self) -> Staging:
        """The staging area of the next step; as many rotate as steps may be in flight."""
        self._next_staging = (self._next_staging + 1) % self.max_in_flight
        return self._stagings[self._next_staging].staging

    def enter_thread(self) -> None:
        """Called once on a thread that does nothing but step."""

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Start a planned step. ``requests``: by id, at least those that this step admits."""
        for slot, request_id in batch.new_slots:
            self.sampler.admit(slot, requests[request_id])
            self.prompt_scorer.admit(slot, requests[request_id])
        buffer = next(s for s in self._stagings if s.staging is staging)
        with torch.inference_mode():
            self.batch.load(batch, self._upload(buffer, batch.packed_len))
            self.batch.context.ends_only = not self.prompt_scorer.unscored
            hidden = self.model(self.batch.input_ids, self.batch.context)
            if spans := self.prompt_scorer.plan(batch, buffer.array):
                for scored in self.prompt_scorer.score(spans, hidden):
                    scored.record()
            num_samples = batch.num_samples
            # A prefill chunk that is not its prompt's last samples nothing; a step of decodes
            # samples every row.
            if num_samples != batch.num_tokens:
                hidden = hidden.index_select(0, self.batch.sample_rows[:num_samples])
            logits = self.model.compute_logits(hidden)
            array = buffer.array
            rows = array[batch.sample_rows_offset :][:num_samples]
            slots = array[batch.sample_slots_offset :][:num_samples]
            positions = array[batch.positions_offset :][rows]
            return ComputedStep(batch.step_id, self.sampler.sample(logits, slots, positions))

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """The tokens of a launched step, in the order of its samples. Blocks until they exist."""
        assert isinstance(in_flight, ComputedStep)
        return in_flight.sampled

    def warm_up(self) -> None:
        """One decode that stores nothing: threads start, weights are paged in."""
        drop_library_pages()

        def ints(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        context = AttentionContext(
            positions=ints(0),
            slot_mapping=ints(-1),
            slots=ints(self.max_num_seqs),
            seq_lens=ints(1),
            query_start_loc=ints(0, 1),
            block_table=self.batch.block_table,
            num_reqs=1,
            num_decodes=1,
            max_query_len=1,
            max_seq_len=1,
        )
        with torch.inference_mode():
            self.model.compute_logits(self.model(ints(0), context))

    def capture_next(self) -> bool:
        """Use a moment with nothing to do to make later steps faster; whether there is more."""
        return False

    # ------------------------------------------------------------------------------- accounts

    def memory_table(self) -> list[tuple[str, str]]:
        """What takes how much memory, for people to read."""
        plan = self._plan
        dtype = str(self.kv_caches[0][0].dtype).removeprefix("torch.")
        return [
            ("device", str(self.device)),
            ("KV cache", f"{plan.nbytes / (1 << 20):,.1f} MiB, {dtype}"),
            ("KV blocks", f"{plan.num_blocks:,} of {plan.block_size} tokens"),
            ("KV tokens", f"{plan.num_tokens:,}"),
            ("context", f"{plan.max_model_len:,} tokens"),
            ("requests in a step", f"{self.max_num_seqs:,}"),
            ("tokens in a step", f"{self.max_num_batched_tokens:,}"),
        ]

    def is_fatal(self, error: BaseException) -> bool:
        """Whether no later step can succeed: the device's context is broken."""
        broken = getattr(torch, "AcceleratorError", None)
        return broken is not None and isinstance(error, broken)

    # -------------------------------------------------------------------------------- details

    def _upload(self, buffer: StagingBuffer, packed_len: int) -> torch.Tensor:
        """The step's staged integers, on the device."""
        host = buffer.host[:packed_len]
        if self.device.type == "cpu":
            return host
        return self._packed[:packed_len].copy_(host, non_blocking=True)

    def _new_staging_buffer(self) -> StagingBuffer:
        length = Staging.required_len(
            self.max_num_batched_tokens, self.max_num_seqs, self.max_model_len, self.block_size
        )
        return StagingBuffer(length, (), self.device.type != "cpu")

    def _available_bytes(self) -> int:
        """What the KV cache may take, with the weights in place."""
        if self.device.type == "cpu":
            return int(available_cpu_bytes() * MAX_CPU_MEMORY_FRACTION)
        free, _total = torch.cuda.mem_get_info(self.device)
        return int(free * self.config.gpu_memory_utilization)

    def _batched_tokens(self, default: int) -> int:
        """max_num_batched_tokens: without chunks, a step must hold the longest prompt."""
        config = self.config
        if config.enable_chunked_prefill:
            return config.max_num_batched_tokens or default
        tokens = config.max_num_batched_tokens or max(default, self.max_model_len)
        if tokens < self.max_model_len:
            raise ModelLoadError(
                f"max_num_batched_tokens {tokens} must be at least max_model_len "
                f"{self.max_model_len} without chunked prefill"
            )
        return tokens


def resolve_device(config: EngineConfig) -> torch.device:
    """Where the model runs.

    Raises:
        ModelLoadError: a GPU is asked for and there is none.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device cuda: there is no GPU that torch can use")
    return torch.device(config.device)


def set_num_threads(ops: OpSet, asked: int | None) -> None:
    """Threads of the kernels: what was asked for, else every core this process may use."""
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
