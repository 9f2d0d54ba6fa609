"""Pipeline: the stages of a model before its last one, and how a step passes through them.

Each stage has a stream and graphs of its own, and works at one step while the next stage is still
at the one before. Nothing is read by the host on the way: a stage's stream waits for the states
that it computes with, and the first stage's for the step that samples its input tokens, whose ids
it reads in the last stage's memory. The scheduler has such a step be as many steps back as there
are stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from octavo.kernels.gpu.peers import open_memory
from octavo.models.registry import CausalLM
from octavo.runner.cuda_graphs import StepShape
from octavo.runner.hand_over import HandOver
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.mesh import Exchange, Mesh
from octavo.runner.peer_access import check_access
from octavo.runner.shard import GpuShard, StepIds
from octavo.runner.stage_shard import StageShard
from octavo.runner.staging import StagingBuffer

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch


class Pipeline:
    """The earlier stages of a model whose last stage is ``last``.

    Args:
        make: a shard of its part, given its stage's exchange.

    Raises:
        ModelLoadError: two of the devices cannot reach each other's memory.
    """

    def __init__(
        self,
        loaded: LoadedModel[CausalLM],
        last: Mesh[GpuShard],
        make: Callable[[ModelPart[CausalLM], Exchange], StageShard],
    ) -> None:
        devices = [part.device for part in loaded.parts]
        check_access(devices)
        open_memory(devices)
        self._stages = [
            stage.map(lambda part, exchange=stage.exchange: make(part, exchange))  # type: ignore[misc]
            for stage in loaded.earlier
        ]
        self._last, self._ids = last, last.lead.ids
        # Of the step whose ids a turn holds, or will.
        self._steps = [-1] * len(self._ids)
        shape = (len(last.lead.buffers.input_ids), loaded.shape.handed_size)
        dtype = loaded.dtypes.activations
        receivers: Sequence[Mesh[StageShard] | Mesh[GpuShard]] = (*self._stages[1:], last)
        for stage, after in zip(self._stages, receivers, strict=True):
            for sender, receiver in zip(stage.shards, after.shards, strict=True):
                way = HandOver(receiver.device, sender.stream, shape, dtype, len(self._ids))
                sender.next = receiver.states_before = way
        for shard in self._stages[0].shards:
            # The lead's: its stream is the one that steps are waited for on.
            shard.read_tokens_of(last.lead.buffers.slot_table)

    @property
    def shards(self) -> list[StageShard]:
        """Of all its stages."""
        return [shard for stage in self._stages for shard in stage.shards]

    def run_nothing(self) -> None:
        """As GpuShard.run_nothing, on every shard."""
        for stage in self._stages:
            stage.each(StageShard.run_nothing)

    def capture(self, shape: StepShape) -> None:
        """Capture the graphs of a shape."""
        for stage in self._stages:
            stage.each(StageShard.capture, shape)

    def launch(
        self,
        batch: ScheduledBatch,
        buffer: StagingBuffer,
        length: int,
        shape: StepShape,
        ids: StepIds,
        *,
        padded: bool,
        has_context: bool,
    ) -> None:
        """Start a step on every stage in order, and have the last one wait for its states.

        Args:
            length: int32 elements of the packed plan.
            shape: what the last stage runs it in.
            ids: where the step's own ids will arrive.
            padded: whether the shape may be captured.
            has_context: whether the driver may be called on this thread.
        """
        self._await(batch.awaited_step)
        self._steps[ids.turn] = batch.step_id
        for stage in self._stages:
            lead = stage.lead
            if has_context and lead.driver is not None and lead.graphs.get(shape) is not None:
                for shard in reversed(stage.shards):
                    shard.replay(shape, buffer.address, 4 * length, ids.turn)
            else:
                stage.each(StageShard.run, buffer.host[:length], shape, ids.turn, padded=padded)
        for receiver in reversed(self._last.shards):
            receiver.take_states(shape.rows, ids.turn)

    def _await(self, step_id: int | None) -> None:
        """Have the first stage wait for the tokens of a step that is on its way."""
        if step_id is None:
            return
        ids = self._ids[self._steps.index(step_id)]
        for shard in self._stages[0].shards:
            shard.await_event(ids.handle)

    def has_lost_a_rank(self) -> bool:
        """As Exchange.has_lost_a_rank, of any stage."""
        return any(stage.exchange.has_lost_a_rank() for stage in self._stages)
