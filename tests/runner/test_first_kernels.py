"""First kernels: the pass over stand-ins, which leaves the runner's own shards as they were.

In Triton's interpreter, where the pass computes in place of compiling. With a GPU every start has it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from octavo.engine import engine_loop
from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.step import HEADER_LEN
from octavo.kernels.slots import RECORD_LEN
from octavo.llm import LLM
from octavo.runner import first_kernels, loading
from octavo.runner.cuda_graphs import StepShape
from octavo.runner.graphs import GraphRunner
from octavo.runner.largest_step import LargestStep
from octavo.runner.shard import GpuShard
from octavo.sampling_params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class NoStep(LargestStep):
    """Its pinned memory is a GPU's."""

    def run(self, part: Any) -> None:
        assert part.rank == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a device to compile for")
def test_stand_ins_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    stood_in: list[int] = []

    def make(with_pass: bool) -> LLM:
        def make_runner(config: Any, source: Any) -> GraphRunner:
            loaded = loading.load(config, source)
            if with_pass:
                plain = GraphRunner(loaded)

                def make_shard(part: Any, plan: Any, sizes: Any) -> GpuShard:
                    stood_in.append(plan.num_blocks)
                    return GpuShard(
                        loaded,
                        part,
                        None,
                        plain.sampling,
                        plan,
                        sizes,
                        plan_len=HEADER_LEN + sizes.plan_len + 64 * RECORD_LEN,
                        max_padding=8,
                        num_turns=3,
                    )

                first_kernels.compile_first_kernels(
                    loaded,
                    [NoStep(loaded, [plain.sampling], [None], loaded.mesh)],
                    make_shard,
                    plain._plan,
                    plain._sizes,
                    [StepShape(1, 0, 0), StepShape(0, 1, 8), StepShape(2, 1, 4)],
                )
            return GraphRunner(loaded)

        monkeypatch.setattr(engine_loop, "make_runner", make_runner)
        return LLM(
            str(tmp_path),
            load_format="dummy",
            device="cpu",
            dtype="float32",
            attention_backend="reference",
            threads=1,
            block_size=4,
            max_num_seqs=4,
            max_model_len=64,
            max_num_batched_tokens=16,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 20,
        )

    monkeypatch.setattr(loading, "get_ops", lambda *_: gpu.OPS)
    monkeypatch.setattr(gpu, "compile_only", contextlib.nullcontext)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": [3, 5, 8, 13, 21]}, {"prompt_token_ids": [2, 4]}]
    found = []
    for with_pass in (False, True):
        outputs = make(with_pass).generate(prompts, params, use_tqdm=False)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]
    assert stood_in == [first_kernels.FEW_BLOCKS]
