"""The cost of a step to the engine's thread, with one shard and with several: without a device.

    python bench/host_cost.py --shards 2 --batch-size 64

Steps of decodes run through the whole engine (schedule, launch, collect, update) with a model of
random weights that is never computed: its graphs are names, and every call of the driver is one of
a C function that returns at once. So what a real driver takes for its calls comes on top, as often
as there are shards. Needs triton, and no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.runner.cuda_driver import CudaDriver
from octavo.runner.cuda_graphs import CapturedGraph
from octavo.runner.graphs import GraphRunner
from octavo.runner.loading import load
from octavo.sampling_params import SamplingParams

WARM_UP = 200
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


class IdleDriver(CudaDriver):
    """Its calls do nothing and succeed, at what a call through ctypes costs."""

    def __init__(self) -> None:
        # Takes nothing and returns 0, the default rounding; whatever is passed is not looked at.
        nothing = ctypes.PyDLL("libm.so.6").fegetround
        for name in ("_copy_to_device", "_launch_graph", "_record_event", "_query_event"):
            setattr(self, name, nothing)
        self._set_context = nothing
        self._stream, self._context = 1, 1


class UncomputedRunner(GraphRunner):
    """Computes nothing, not even to warm up."""

    def warm_up(self) -> None:
        """Do nothing."""


def make_engine(folder: Path, shards: int, batch_size: int) -> engine_loop.EngineLoop:
    """The engine, all of whose decode steps of ``batch_size`` are captured in name."""
    (folder / "config.json").write_text(json.dumps(CONFIG))

    def make_runner(config: EngineConfig, source: Any) -> GraphRunner:
        return UncomputedRunner(load(config, source))

    vars(engine_loop)["make_runner"] = make_runner
    engine = engine_loop.EngineLoop(
        EngineConfig(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            mesh=",".join(["cpu"] * shards),
            max_num_seqs=batch_size,
            max_model_len=4096,
            num_gpu_blocks_override=batch_size * 256,
        )
    )
    runner: Any = engine.runner
    shape = runner._shapes.find(batch_size, 0, 0)
    assert shape is not None
    nothing = torch.zeros(batch_size, dtype=torch.int32), torch.zeros(batch_size, 1)
    for shard in runner.mesh.shards:
        shard.driver = IdleDriver()
        shard.graphs._graphs[shape, False] = CapturedGraph(SimpleNamespace(), 1, nothing)  # type: ignore[arg-type]
        for ids in shard.ids:
            ids.done = SimpleNamespace(synchronize=lambda: None)
    runner._driver = runner._lead.driver
    runner._compute = lambda *args: (*nothing, ())
    runner._steady[batch_size] = 1
    runner._device_thread = get_ident()
    return engine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=2, help="compared with one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    medians = []
    for shards in (1, args.shards):
        with tempfile.TemporaryDirectory() as folder:
            engine = make_engine(Path(folder), shards, args.batch_size)
            params = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)
            for _ in range(args.batch_size):
                engine.submit(engine.prepare(TokenIds([1, 2, 3]), params))
            times = []
            for _ in range(WARM_UP + args.steps):
                began = time.perf_counter_ns()
                engine.step()
                times.append(time.perf_counter_ns() - began)
                engine.core.outbox.drain()
            if engine.core.stats()["num_running"] != args.batch_size:
                raise RuntimeError(f"not all requests run: {engine.core.stats()}")
            medians.append(statistics.median(times[WARM_UP:]) / 1000)
        print(f"{shards} shards: {medians[-1]:.1f} us a step of {args.batch_size} requests")
    print(f"ratio {medians[1] / medians[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
