"""DeviceShard: one GPU's part of a model, and the buffers that a step's plan is unpacked to.

A stream and the driver's calls on it, the KV cache of its layers, the packed plan and what
``prepare_step`` makes of it. A shard of the last stage samples as well (shard.py); one of an
earlier stage hands its states on (stage_shard.py).

Without a GPU there is no stream and nothing is captured: Triton's interpreter runs the same code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor

from octavo.kernels.gpu.step import StepBuffers, prepare_step
from octavo.kernels.shared_prefixes import GROUP_FIELDS, MAX_GROUPS, SharedPrefixes
from octavo.layers.context import StepContext
from octavo.models.registry import CausalLM
from octavo.runner.cuda_driver import CudaDriver
from octavo.runner.cuda_graphs import StepShape, computing
from octavo.runner.hand_over import HandOver
from octavo.runner.kv_cache import KVCachePlan, allocate_kv_cache
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.mesh import Exchange
from octavo.runner.sizing import StepSizes
from octavo.runner.state_cache import make_states


class DeviceShard:
    """The buffers and modules that a shard owns on its device, whatever its stage.

    Args:
        stream: where everything runs; None is Triton's interpreter.
        exchange: with the other shards of its stage.
        slot_table: int32 [slots, RECORD_LEN] on this device, every request's record.
        plan_len: int32 elements of the packed plan, header and records included.
        max_padding: rows, or requests, that a step's shape has at most beyond the step's own.
    """

    def __init__(
        self,
        loaded: LoadedModel[CausalLM],
        part: ModelPart[CausalLM],
        stream: torch.cuda.Stream | None,
        exchange: Exchange,
        plan: KVCachePlan,
        sizes: StepSizes,
        slot_table: Tensor,
        *,
        plan_len: int,
        max_padding: int,
    ) -> None:
        self.device, self.model, self.rank = part.device, part.model, part.rank
        self.stream = stream
        self.driver: CudaDriver | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                self.driver = CudaDriver(stream.cuda_stream)
        # What comes from the stage before, if there is one.
        self.states_before: HandOver | None = None
        self._max_model_len = sizes.max_model_len
        caches = allocate_kv_cache(plan, self.model.config, loaded.kv_dtype, self.device)
        self.kv_bytes = sum(keys.nbytes + values.nbytes for keys, values in caches)
        self.model.bind_kv_cache(caches)
        act = loaded.dtypes.activations
        self.state_cache = make_states(sizes.states, self.model, act, self.device)
        self.packed = torch.zeros(plan_len, dtype=torch.int32, device=self.device)
        self.packed_address = self.packed.data_ptr()
        self.buffers = self._make_buffers(sizes, slot_table, max_padding)
        # The thread that does nothing but step: it stays on this stream.
        self._thread: int | None = None
        self._exchange = exchange
        if stream is not None:
            # All of this becomes zeros on the caller's stream, the cache of many gigabytes first.
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def _make_buffers(self, sizes: StepSizes, slot_table: Tensor, max_padding: int) -> StepBuffers:
        reqs = sizes.max_num_seqs + max_padding
        num_rows = sizes.max_num_batched_tokens + reqs

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        return StepBuffers(
            input_ids=ints(num_rows),
            positions=ints(num_rows),
            slot_mapping=ints(num_rows),
            slots=ints(reqs),
            seq_lens=ints(reqs),
            query_start_loc=ints(reqs + 1),
            sample_rows=ints(reqs),
            sample_slots=ints(reqs),
            block_table=ints(sizes.max_num_seqs + 1, sizes.max_blocks_per_seq),
            shared_groups=ints(MAX_GROUPS, GROUP_FIELDS),
            shared_members=ints(reqs),
            shared_tokens=ints(reqs),
            slot_table=slot_table,
            sampled_table=slot_table,
        )

    # ---------------------------------------------------------------------------------- threads

    def enter_thread(self) -> None:
        """Keep the calling thread, which does nothing but step, on this stream without autograd."""
        if self.stream is not None:
            torch.cuda.set_device(self.stream.device)
            torch.cuda.set_stream(self.stream)
            torch.inference_mode().__enter__()  # for good: it costs a step 20 us
            self._thread = get_ident()

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Without autograd, on this stream; the shard's own thread is so already."""
        if get_ident() == self._thread:
            return contextlib.nullcontext()
        return computing(self.stream)

    # ------------------------------------------------------------------------------------ steps

    def take_states(self, rows: int, turn: int) -> None:
        """Have the stream wait for a step's states from the stage before, if there is one."""
        if self.states_before is not None:
            self.enter()
            self.states_before.receive(rows, turn, self.driver)

    def enter(self) -> None:
        """Give the calling thread the device's context, for the driver's own calls."""
        if self.driver is not None:
            self.driver.enter()

    def clear_plan(self) -> None:
        """Make the plan on the device empty: every row is padding, nothing is stored."""
        self.packed.zero_()

    def upload_rows(self, rows: Tensor) -> Tensor:
        """Rows of states from pinned memory, on the device when the stream comes to it."""
        with self.ready():
            return rows.to(self.device, non_blocking=True, copy=True)

    def copy_states(self, rows: Tensor) -> None:
        """Copy rows of states, before a step or after it; ``rows`` as StateCache.copy's."""
        if self.state_cache is not None:
            with self.ready():
                self.state_cache.copy(rows)

    def _upload(self, staged: Tensor) -> None:
        self.packed[: len(staged)].copy_(staged, non_blocking=True)

    def _states(self, shape: StepShape) -> Tensor:
        """Hidden states of the packed plan by the model's part, padded to the shape: [rows, D]."""
        buffers = self.buffers
        prepare_step(
            self.packed,
            buffers,
            decode_rows=shape.decode_rows,
            prefill_reqs=shape.prefill_reqs,
            prefill_rows=shape.prefill_rows,
            shares=shape.shares,
            embeds=self.states_before is None,
        )
        rows, reqs = shape.rows, shape.reqs
        shared = None
        if shape.shares:
            shared = SharedPrefixes(
                buffers.shared_groups, buffers.shared_members[:reqs], buffers.shared_tokens[:reqs]
            )
        context = StepContext(
            positions=buffers.positions[:rows],
            slot_mapping=buffers.slot_mapping[:rows],
            slots=buffers.slots[:reqs],
            seq_lens=buffers.seq_lens[:reqs],
            query_start_loc=buffers.query_start_loc[: reqs + 1],
            block_table=buffers.block_table,
            num_reqs=reqs,
            num_decodes=shape.decode_rows,
            # Bounds; the kernels' grids do not depend on lengths.
            max_query_len=max(shape.prefill_rows, 1),
            max_seq_len=self._max_model_len,
            shared=shared,
        )
        inputs = buffers.input_ids[:rows]
        if self.states_before is not None:
            inputs = self.states_before.states[:rows]
        return self.model(inputs, context)

    def _prepare_graph(self) -> Callable[[int], None] | None:
        """GraphCache's ``prepare`` where other shards take part in a step."""
        driver, stream = self.driver, self.stream
        if driver is None or stream is None or self._exchange.size == 1:
            return None
        barrier = functools.partial(self._exchange.barrier, self.rank)
        return functools.partial(_prepare_graph, driver, stream, barrier)


def _prepare_graph(
    driver: CudaDriver, stream: torch.cuda.Stream, barrier: Callable[[], None], handle: int
) -> None:
    """Do what a graph's first launch would do, and wait for the other shards to have come here.

    A graph that waits for a peer must not run while the peer still captures, or allocates.
    """
    driver.upload(handle)
    stream.synchronize()
    barrier()
