"""First kernels: those of the largest step and of the first shapes, compiled before any runs.

They depend on the shapes of a KV cache, not on its size, which only the largest step's run can
tell: shards with a cache of a few blocks stand in for those to come. One pass compiles all at once,
where one for each would wait for its slowest kernel twice (bench/NOTES.md, "Start-up on an H200").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from octavo.kernels.gpu import ops as gpu
from octavo.models.registry import CausalLM
from octavo.runner.cuda_graphs import StepShape
from octavo.runner.kv_cache import KVCachePlan
from octavo.runner.largest_step import LargestStep
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.shard import GpuShard
from octavo.runner.sizing import StepSizes

# As many as a stand-in's cache has; any number divisible by 16, as those of real ones mostly are.
FEW_BLOCKS = 16

MakeShard = Callable[[ModelPart[CausalLM], KVCachePlan, StepSizes], GpuShard]


def compile_first_kernels(
    loaded: LoadedModel[CausalLM],
    largest: Sequence[LargestStep],
    make_shard: MakeShard,
    plan: KVCachePlan,
    sizes: StepSizes,
    shapes: Sequence[StepShape],
) -> None:
    """Compile the kernels of ``largest`` and, where one stage is all, of ``shapes``.

    Args:
        make_shard: a shard of the last stage, of a given cache.
        plan, sizes: those of a cache in all the memory there is now: of the right shapes.
    """
    num_blocks = min(plan.num_blocks, FEW_BLOCKS)
    states = None if sizes.states is None else replace(sizes.states, num_checkpoints=0)
    plan = replace(plan, num_blocks=num_blocks)
    sizes = replace(sizes, num_blocks=num_blocks, states=states)
    for step in largest:
        for part in step.parts:
            # Kernels are loaded on the device that is the current one when the pass begins.
            with step.computing(part), gpu.compile_only():
                step.run(part)
                if not loaded.earlier:
                    shard = make_shard(part, plan, sizes)
                    for shape in shapes:
                        shard.forward(shape)
                    del shard
    # The steps to come allocate anew, and the cache is measured by what they leave.
    torch.cuda.empty_cache()
