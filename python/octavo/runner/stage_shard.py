"""StageShard: what one GPU owns of a pipeline's stage that is not the last."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import slots
from octavo.models.registry import CausalLM
from octavo.runner.cuda_graphs import GraphCache, StepShape
from octavo.runner.device_shard import DeviceShard
from octavo.runner.hand_over import HandOver
from octavo.runner.kv_cache import KVCachePlan
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.mesh import Exchange
from octavo.runner.sizing import StepSizes


class StageShard(DeviceShard):
    """One rank of an earlier stage: its graphs go from a plan, and states, to states."""

    def __init__(
        self,
        loaded: LoadedModel[CausalLM],
        part: ModelPart[CausalLM],
        stream: torch.cuda.Stream | None,
        exchange: Exchange,
        plan: KVCachePlan,
        sizes: StepSizes,
        *,
        plan_len: int,
        max_padding: int,
    ) -> None:
        records = torch.zeros(
            (sizes.max_num_seqs + 1, slots.RECORD_LEN), dtype=torch.int32, device=part.device
        )
        super().__init__(
            loaded,
            part,
            stream,
            exchange,
            plan,
            sizes,
            records,
            plan_len=plan_len,
            max_padding=max_padding,
        )
        self.graphs: GraphCache[Tensor] = GraphCache(stream, prepare=self._prepare_graph())
        # Where the states go; the next stage's.
        self.next: HandOver | None = None

    def read_tokens_of(self, table: Tensor) -> None:
        """Take tokens that are still on a device from the slot table of the shard that samples."""
        self.buffers = self.buffers._replace(sampled_table=table)

    def await_event(self, event: int) -> None:
        """Have the stream wait for another's event."""
        if self.driver is not None:
            self.driver.enter()
            self.driver.await_event(event)

    def replay(self, shape: StepShape, plan_address: int, nbytes: int, turn: int) -> None:
        """``run`` of a shape that is captured, its plan copied from a pinned address."""
        graph = self.graphs.get(shape)
        assert graph is not None
        assert self.driver is not None
        assert self.next is not None
        self.driver.enter()
        self.take_states(shape.rows, turn)
        self.driver.start((self.packed_address, plan_address, nbytes), graph.handle)
        self.next.send(graph.output, shape.rows, turn, self.driver)

    def run(self, staged: Tensor, shape: StepShape, turn: int, *, padded: bool) -> None:
        """Compute the step that is staged in a shape, and send its states.

        ``padded``: the shape may be captured.
        """
        assert self.next is not None
        with self.ready():
            self.take_states(shape.rows, turn)
            self._upload(staged)
            states = self.compute(shape) if padded else self.forward(shape)
            self.enter()
            self.next.send(states, shape.rows, turn, self.driver)

    def run_nothing(self) -> None:
        """As GpuShard.run_nothing."""
        with self.ready():
            self.clear_plan()
            self.forward(StepShape(1, 0, 0))

    def capture(self, shape: StepShape) -> None:
        """As GpuShard.capture."""
        with self.ready():
            # The last step's plan must not be carried out again.
            self.clear_plan()
            for _ in range(2):
                self.compute(shape)

    def compute(self, shape: StepShape) -> Tensor:
        """States [rows, D] of the plan on the device; captured at its second run."""
        return self.graphs.run(shape, lambda: self.forward(shape))

    def forward(self, shape: StepShape) -> Tensor:
        """States [rows, D] of the packed plan, padded to the shape."""
        return self._states(shape)
