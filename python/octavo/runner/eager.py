"""EagerRunner: steps computed op by op within ``launch``, and sampled on the host.

For a CPU, for the reference ops anywhere, and for models whose own code cannot be captured. Of a
mesh of several shards each runs its part of the model, and of a pipeline one stage after the other;
tokens are sampled from the logits of the last stage's rank 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo._core import Staging
from octavo.layers.context import StepContext
from octavo.models.registry import CausalLM
from octavo.pooling import PoolingInfo
from octavo.runner.input_batch import InputBatch
from octavo.runner.kv_cache import KVCachePlan, allocate_kv_cache
from octavo.runner.library_pages import drop_library_pages
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.logprobs import LogprobsMode
from octavo.runner.masks import FillMasks, Masks, empty_masks
from octavo.runner.mesh import Mesh
from octavo.runner.prompt_scorer import PromptScorer, PromptSpan, ScoredRows, collected
from octavo.runner.request_state import RequestState
from octavo.runner.runner import InFlight, Observer, is_device_error
from octavo.runner.sampler import SampledTokens, Sampler
from octavo.runner.sizing import StepSizes, available_bytes, fit_cache
from octavo.runner.staging import StagingBuffer
from octavo.runner.state_cache import make_states

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch


@dataclass(slots=True, eq=False)
class EagerStep(InFlight):
    """A step whose logits are computed, and whose tokens once ``sampled`` is there."""

    logits: Tensor
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    scored: Sequence[ScoredRows]
    sampled: SampledTokens | None = None


class EagerShard:
    """One rank's part of the model, its caches, and the step that it computes.

    ``kv_caches``: (keys, values) of each layer that keeps them. ``is_last``: the model's logits
    come from it.
    """

    def __init__(
        self,
        part: ModelPart[CausalLM],
        plan: KVCachePlan,
        sizes: StepSizes,
        kv_dtype: torch.dtype,
        act_dtype: torch.dtype,
        vocab_size: int,
        logprobs_mode: LogprobsMode,
        *,
        is_last: bool = True,
    ) -> None:
        self.device, self.model = part.device, part.model
        self.kv_caches = allocate_kv_cache(plan, self.model.config, kv_dtype, self.device)
        self.model.bind_kv_cache(self.kv_caches)
        self.states = make_states(sizes.states, self.model, act_dtype, self.device)
        self.batch = InputBatch(sizes.max_num_seqs, sizes.max_blocks_per_seq, self.device)
        self.prompt_scorer = PromptScorer(self.model.compute_logits, vocab_size, logprobs_mode)
        self._spare_slot = sizes.max_num_seqs
        self._is_last = is_last
        # A CPU reads the plan where the core wrote it.
        self._packed: Tensor | None = None
        if self.device.type != "cpu":
            self._packed = torch.zeros(sizes.plan_len, dtype=torch.int32, device=self.device)

    def compute(
        self,
        batch: ScheduledBatch,
        staged: Tensor,
        spans: Sequence[PromptSpan],
        states: Tensor | None = None,
    ) -> tuple[Tensor, list[ScoredRows]]:
        """A step's logits, float32 [num_samples, V], and the scores of ``spans``.

        ``staged``: the plan, int32 [packed_len], on the host. ``states``: of the stage before.
        """
        with torch.inference_mode():
            hidden = self._hidden(batch, staged, states, ends_only=not spans)
            scored = self.prompt_scorer.score(spans, hidden)
            num_samples = batch.num_samples
            # A prefill chunk that is not its prompt's last samples nothing; a step of decodes
            # samples every row.
            if num_samples != batch.num_tokens:
                hidden = hidden.index_select(0, self.batch.sample_rows[:num_samples])
            return self.model.compute_logits(hidden), scored

    def pass_on(
        self, batch: ScheduledBatch, staged: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """A step's states [T, D] after a stage that is not the last; arguments as ``compute``'s."""
        with torch.inference_mode():
            return self._hidden(batch, staged, states, ends_only=False)

    def warm_up(self, states: Tensor | None = None) -> Tensor:
        """One decode that stores nothing; returns its states, or logits."""

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        context = StepContext(
            positions=ints(0),
            slot_mapping=ints(-1),
            slots=ints(self._spare_slot),
            seq_lens=ints(1),
            query_start_loc=ints(0, 1),
            block_table=self.batch.block_table,
            num_reqs=1,
            num_decodes=1,
            max_query_len=1,
            max_seq_len=1,
        )
        with torch.inference_mode():
            hidden = self.model(ints(0) if states is None else states, context)
            return self.model.compute_logits(hidden) if self._is_last else hidden

    def _hidden(
        self, batch: ScheduledBatch, staged: Tensor, states: Tensor | None, *, ends_only: bool
    ) -> Tensor:
        """Hidden states of a step by the model's part: [T, D]."""
        packed = self._upload(staged)
        self.batch.load(batch, packed)
        self.batch.context.ends_only = ends_only
        inputs = self.batch.input_ids
        if states is not None:
            # A copy: layers add to it, and other ranks are given the same states.
            inputs = states.to(self.device, copy=True)
        if self.states is None:
            return self.model(inputs, self.batch.context)
        if batch.num_state_restores:
            begin, end = batch.state_restores_offset, batch.state_saves_offset
            self.states.copy(packed[begin:end])
        hidden = self.model(inputs, self.batch.context)
        if batch.num_state_saves:
            self.states.copy(packed[batch.state_saves_offset : batch.packed_len])
        return hidden

    def _upload(self, staged: Tensor) -> Tensor:
        if self._packed is None:
            return staged
        return self._packed[: len(staged)].copy_(staged, non_blocking=True)


class EagerRunner:
    """See Runner. ``model``: rank 0's part.

    Raises:
        ModelLoadError: one request of max_model_len does not fit into memory.
    """

    max_in_flight = 1
    num_stages = 1
    padded_prompts: Sequence[int] = ()
    keeps_kv = True
    prefix_sharing: tuple[int, int, int] | None = None
    pooling: PoolingInfo | None = None

    def __init__(self, loaded: LoadedModel[CausalLM]) -> None:
        self._loaded = loaded
        free = available_bytes(loaded.config, loaded.device)
        self._plan, self._sizes = fit_cache(loaded, free)
        self.num_blocks = self._sizes.num_blocks
        self.block_size = self._sizes.block_size
        self.max_num_seqs = self._sizes.max_num_seqs
        self.max_num_batched_tokens = self._sizes.max_num_batched_tokens
        self.max_model_len = self._sizes.max_model_len
        states = self._sizes.states
        self.num_state_checkpoints = None if states is None else states.num_checkpoints
        mode = LogprobsMode.of(loaded.config.logprobs_mode)
        *earlier, self.mesh = (
            stage.map(
                functools.partial(
                    EagerShard,
                    plan=self._plan,
                    sizes=self._sizes,
                    kv_dtype=loaded.kv_dtype,
                    act_dtype=loaded.dtypes.activations,
                    vocab_size=loaded.shape.vocab_size,
                    logprobs_mode=mode,
                    is_last=stage is loaded.mesh,
                )
            )
            for stage in (*loaded.earlier, loaded.mesh)
        )
        self._earlier: list[Mesh[EagerShard]] = earlier
        self.model = self.mesh.lead.model
        self.prompt_scorer = self.mesh.lead.prompt_scorer
        self.sampler = Sampler(self.max_num_seqs, loaded.config.seed, mode)
        self._buffer = StagingBuffer(self._sizes.plan_len, pinned=loaded.device.type != "cpu")
        # Made with the first constrained step.
        self._masks: Masks | None = None

    # ---------------------------------------------------------------------------------- steps

    def next_staging(self) -> Staging:
        """The one there is: steps do not overlap."""
        return self._buffer.staging

    def enter_thread(self) -> None:
        """Nothing belongs to a thread."""

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Compute a planned step to its tokens, or to its logits where those wait for masks."""
        for slot, request_id, _ in batch.new_slots:
            self.sampler.admit(slot, requests[request_id])
            self.prompt_scorer.admit(slot, requests[request_id])
        array, staged = self._buffer.array, self._buffer.host[: batch.packed_len]
        spans = self.prompt_scorer.plan(batch, array)
        states = None
        for stage in self._earlier:
            states = stage.each(EagerShard.pass_on, batch, staged, states)[0]
        logits, scored = self.mesh.each(EagerShard.compute, batch, staged, spans, states)[0]
        sample_rows = array[batch.sample_rows_offset :][: batch.num_samples]
        slots = array[batch.sample_slots_offset :][: batch.num_samples]
        positions = array[batch.positions_offset :][sample_rows]
        step = EagerStep(batch.step_id, logits, slots, positions, scored)
        if not batch.num_constrained:
            self._sample(step, None)
        return step

    def choose(self, in_flight: InFlight, fill: FillMasks) -> None:
        """Choose the tokens of a step that waits for its masks."""
        assert isinstance(in_flight, EagerStep)
        if self._masks is None:
            self._masks = empty_masks(self.max_num_seqs, in_flight.logits.shape[1])
        self._sample(in_flight, self._masks.filled(fill))

    def _sample(self, step: EagerStep, masks: Masks | None) -> None:
        with torch.inference_mode():
            sampled = self.sampler.sample(step.logits, step.slots, step.positions, masks)
        # The device has come past them: it has computed the logits, which came later.
        if extras := collected(step.scored):
            sampled = sampled._replace(extras=extras)
        step.sampled = sampled

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """The tokens, which have been chosen already."""
        assert isinstance(in_flight, EagerStep)
        assert in_flight.sampled is not None
        return in_flight.sampled

    def abandon(self) -> None:
        """See Runner."""
        if self._loaded.device.type == "cuda":
            torch.cuda.synchronize(self._loaded.device)
        self.prompt_scorer.unscored.clear()

    def warm_up(self) -> None:
        """Start threads and page in weights."""
        drop_library_pages()
        states = None
        for stage in (*self._earlier, self.mesh):
            states = stage.each(EagerShard.warm_up, states)[0]

    def idle_work(self) -> bool:
        """There is none."""
        return False

    # ------------------------------------------------------------------------------- accounts

    def memory(self) -> list[tuple[str, str]]:
        """Sizes and memory use by purpose."""
        return [
            ("device", str(self._loaded.device)),
            *self._plan.rows(self._loaded.kv_dtype),
            *self._sizes.rows(),
        ]

    def is_fatal(self, error: BaseException) -> bool:
        """True if the device's context is broken."""
        return is_device_error(error)

    def observe(self, observer: Observer | None) -> None:
        """Nothing to report: a step is computed within ``launch``, which waits for no device."""
