"""Families split over shards on GPUs: what one shard computes.

Two shards share one GPU, each on a stream of its own; with several GPUs they are on two, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from test_gpu_families import CASES, Scored, _free_memory, octavos, save

__all__ = ["_free_memory"]

pytestmark = pytest.mark.gpu

MESHES = ["cuda:0,cuda:0", *(["cuda:0,cuda:1"] if torch.cuda.device_count() > 1 else [])]


def assert_same(found: list[Scored], expected: list[Scored], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, **tolerance)


def fits(config: dict[str, Any]) -> bool:
    """Heads and groups that two shards can have."""
    return bool(config.get("num_attention_heads", 4) % 2 == 0)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [name for name, (_, config) in CASES.items() if fits(config)])
def test_two_shards_compute_what_one_does_in_float32(name: str, mesh: str, tmp_path: Path) -> None:
    family, config = CASES[name]
    save(family, config, tmp_path)
    expected = octavos(tmp_path, "float32")
    assert_same(octavos(tmp_path, "float32", mesh=mesh), expected, atol=2e-4, rtol=1e-4)
