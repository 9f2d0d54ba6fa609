"""Families split over shards and stages on GPUs: what one shard computes.

Two share one GPU, each on a stream of its own; with several GPUs they are on two, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from test_gpu_families import CASES, Scored, _free_memory, fits, octavos, save

from octavo.errors import EngineDeadError
from octavo.llm import LLM
from octavo.runner.runner import ShardLostError
from octavo.runner.shard import GpuShard
from octavo.sampling_params import SamplingParams

__all__ = ["_free_memory"]

pytestmark = pytest.mark.gpu

MESHES = ["cuda:0,cuda:0", *(["cuda:0,cuda:1"] if torch.cuda.device_count() > 1 else [])]


def assert_same(found: list[Scored], expected: list[Scored], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, **tolerance)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_shard_that_is_not_launched_ends_the_engine(
    mesh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the 15 s that a lost rank may take, and with no wait left on a device."""
    family, config = CASES["Llama"]
    save(family, config, tmp_path)
    llm = LLM(str(tmp_path), mesh=mesh, max_model_len=200, kv_cache_memory_bytes=64 << 20)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    llm.generate("once", params, use_tqdm=False)
    monkeypatch.setattr(GpuShard, "replay", lambda *_: None)
    began = time.monotonic()
    with pytest.raises(EngineDeadError) as caught:
        llm.generate("again", params, use_tqdm=False)
    assert isinstance(caught.value.__cause__, ShardLostError)
    torch.cuda.synchronize()
    assert time.monotonic() - began < 15


def splits() -> Iterator[tuple[str, str, int]]:
    """(family's case, mesh, stages)."""
    for name, (_, config) in CASES.items():
        for mesh in MESHES:
            if fits(config):
                yield name, mesh, 1
            yield name, mesh, 2
    for mesh in MESHES:
        yield "Llama", f"{mesh},{mesh}", 2


@pytest.mark.parametrize(("name", "mesh", "stages"), list(splits()))
def test_shards_compute_what_one_does_in_float32(
    name: str, mesh: str, stages: int, tmp_path: Path
) -> None:
    family, config = CASES[name]
    save(family, config, tmp_path)
    expected = octavos(tmp_path, "float32", mesh=None, pipeline_parallel_size=1)
    found = octavos(tmp_path, "float32", mesh=mesh, pipeline_parallel_size=stages)
    assert_same(found, expected, atol=2e-4, rtol=1e-4)
