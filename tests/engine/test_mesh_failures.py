"""A shard that fails: its step fails on all shards, and a broken device ends the process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest

from octavo._core import TokenIds
from octavo.config import EngineConfig
from octavo.engine.engine_loop import EngineLoop
from octavo.runner.eager import EagerShard
from octavo.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MESHES = [
    {"mesh": "cpu,cpu"},
    {"mesh": "cpu,cpu,cpu,cpu", "tensor_parallel_size": 4},
    {"mesh": "cpu,cpu", "pipeline_parallel_size": 2},
    {"mesh": "cpu,cpu,cpu,cpu", "pipeline_parallel_size": 2},
]


def make_loop(folder: Path, **mesh: Any) -> EngineLoop:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return EngineLoop(
        EngineConfig(
            model=str(folder), load_format="dummy", device="cpu", dtype="float32", threads=1,
            block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32, **mesh,
        )
    )  # fmt: skip


def finals_of(loop: EngineLoop) -> list[Any]:
    """The last delta of each of four requests, of which two run at a time."""
    for prompt in ([1, 2], [3, 4, 5], [6], [7, 8, 9, 10]):
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        loop.submit(loop.prepare(TokenIds(prompt), params))
    finals = {}
    while loop.step() or loop.core.has_work():
        loop.core.check_integrity()
        finals.update({delta.request_id: delta for delta in loop.core.outbox.drain()})
    finals.update({delta.request_id: delta for delta in loop.core.outbox.drain()})
    return [finals[request_id] for request_id in sorted(finals)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("at", [0, -1])
def test_a_failing_shard_fails_the_step_on_all_and_the_others_requests_go_on(
    mesh: dict[str, Any], at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [delta.token_ids for delta in finals_of(make_loop(tmp_path, **mesh))]
    loop = make_loop(tmp_path, **mesh)
    runner: Any = loop.runner
    stages = [*runner._earlier, runner.mesh]
    failing = stages[at].shards[-1]
    hidden, calls = EagerShard._hidden, 0

    def fail_once(self: EagerShard, *args: Any, **options: Any) -> Any:
        nonlocal calls
        if self is failing:
            calls += 1
            if calls == 2:
                raise MemoryError("this shard has no room")
        return hidden(self, *args, **options)

    monkeypatch.setattr(EagerShard, "_hidden", fail_once)
    finals = finals_of(loop)
    assert [delta.finish_reason for delta in finals] == ["error", "error", "length", "length"]
    assert [delta.token_ids for delta in finals[2:]] == want[2:]
    assert loop.fatal_error is None
    assert loop.core.stats()["num_free_blocks"] == runner.num_blocks


@pytest.mark.parametrize("mesh", MESHES[1:3], ids=str)
def test_nothing_of_a_mesh_is_left_behind(mesh: dict[str, Any], tmp_path: Path) -> None:
    loop = make_loop(tmp_path, **mesh)
    loop.start()
    for prompt in ([1, 2], [3, 4, 5]):
        loop.submit(loop.prepare(TokenIds(prompt), SamplingParams(max_tokens=4)))
    loop.stop()
    assert loop.fatal_error is None
    runner: Any = loop.runner
    shards = [
        weakref.ref(shard) for stage in (*runner._earlier, runner.mesh) for shard in stage.shards
    ]
    del loop, runner
    gc.collect()
    assert [shard() for shard in shards] == [None] * len(shards)
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("octavo-rank") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


BROKEN = """
import sys, torch
from octavo.runner.eager import EagerShard
compute, warm = EagerShard.compute, []
def broken(self, *args, **options):
    warm.append(self)
    if len(warm) == 4:
        raise torch.AcceleratorError("the second shard's device is gone")
    return compute(self, *args, **options)
EagerShard.compute = broken
from octavo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_broken_shard_ends_the_server_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["serve", str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--port", "0"]
    words += ["--mesh", "cpu,cpu", "--skip-tokenizer-init", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = next(word for line in process.stdout for word in line.split() if "://" in word)
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 8, "model": str(tmp_path)}).encode()
        request = urllib.request.Request(
            f"{url.rstrip('/.')}/v1/completions", body, {"Content-Type": "application/json"}
        )
        began = time.monotonic()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=15)
        assert refused.value.code in (500, 503)
        assert process.wait(15) != 0
        assert time.monotonic() - began < 15
    finally:
        process.kill()
        process.wait()
