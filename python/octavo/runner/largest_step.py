"""The largest step, run once before the KV cache takes what memory it leaves."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from octavo.kernels.gpu import ops as gpu
from octavo.kernels.kv_cache import make_cache
from octavo.layers.context import StepContext
from octavo.models.hybrid import HybridForCausalLM
from octavo.models.registry import CausalLM
from octavo.runner.cuda_graphs import computing
from octavo.runner.gpu_sampling import GpuSampling
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.mesh import Mesh
from octavo.runner.sizing import max_num_seqs, max_step_tokens
from octavo.runner.state_cache import StateCache


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that can be captured, as the default one cannot; None on a CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class LargestStep:
    """One request of as many tokens as a step may have, and max_num_seqs samples.

    Args:
        tables: of the last stage's ranks, which sample.
        streams: of one stage's ranks.
        stage: its parts of the model.
    """

    def __init__(
        self,
        loaded: LoadedModel[CausalLM],
        tables: list[GpuSampling],
        streams: list[torch.cuda.Stream | None],
        stage: Mesh[ModelPart[CausalLM]],
    ) -> None:
        self._loaded, self._tables, self._streams, self._stage = loaded, tables, streams, stage
        self._is_first = not loaded.earlier or stage is loaded.earlier[0]
        self._is_last = stage is loaded.mesh

    @property
    def parts(self) -> tuple[ModelPart[CausalLM], ...]:
        """Those of the stage."""
        return self._stage.shards

    def computing(self, part: ModelPart[CausalLM]) -> contextlib.AbstractContextManager[None]:
        """A part's stream and device, without autograd."""
        return computing(self._streams[part.rank])

    def reserve(self) -> None:
        """Run it on every rank, storing nothing.

        The allocator keeps what that took, and no later step needs more: once the device has come
        to its end, the memory that is free is free for good.
        """

        def run(part: ModelPart[CausalLM]) -> None:
            with self.computing(part):
                self.run(part)

        self._stage.each(run)
        for part in self.parts:
            torch.cuda.synchronize(part.device)

    def run(self, part: ModelPart[CausalLM]) -> None:
        """Run one part, within ``computing``; all of a stage's at once where there are several."""
        loaded, model, device = self._loaded, part.model, part.device
        config = loaded.config
        tokens, num_seqs = max_step_tokens(loaded), max_num_seqs(loaded)
        caches = {
            layer: make_cache(
                (1, layer.num_heads, config.block_size, layer.head_dim), loaded.kv_dtype, device
            )
            for layer in set(model.config.cache_shapes)
        }
        model.bind_kv_cache([(caches[layer],) * 2 for layer in model.config.cache_shapes])
        if isinstance(model, HybridForCausalLM) and model.config.state is not None:
            StateCache(1, model, loaded.dtypes.activations, device)

        def ints(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        context = StepContext(
            positions=ints(tokens),
            slot_mapping=ints(tokens, fill=-1),
            slots=ints(1),
            seq_lens=ints(1, fill=tokens),
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=device),
            block_table=ints(1, -(-tokens // config.block_size)),
            num_reqs=1,
            num_decodes=0,
            max_query_len=tokens,
            max_seq_len=tokens,
        )
        inputs = ints(tokens)
        if not self._is_first:
            inputs = torch.zeros(
                (tokens, loaded.shape.handed_size),
                dtype=loaded.dtypes.activations,
                device=device,
            )
        states = model(inputs, context)
        if not self._is_last:
            return
        rows = min(num_seqs, tokens)
        logits = model.compute_logits(states[:rows])
        spare = ints(rows, fill=num_seqs)
        host = torch.zeros((1, rows), dtype=torch.int32, pin_memory=True)
        table = self._tables[part.rank].adjusted
        gpu.sample(logits, spare, table, gpu.HostIds(host, ints(1)))
