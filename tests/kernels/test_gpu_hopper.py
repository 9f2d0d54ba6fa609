"""Prefill attention on Hopper's matrix units: which layers it takes, and that it is right."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.test_gpu import check_attention

from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.hopper_plan import TILES, has_gluon, plan_hopper
from octavo.kernels.gpu.paged_kv import kv_shape

attention = importlib.import_module("octavo.kernels.gpu.attention")


def planned(heads: tuple[int, int, int] = (32, 8, 128), block_size: int = 16, **change: Any) -> Any:
    given: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "cache_dtype": torch.bfloat16,
        "rows": 1024,
        "num_reqs": 4,
        "sliding_window": 0,
        "causal": True,
        "has_slopes": False,
    }
    shape = kv_shape(torch.zeros(1, heads[1], block_size, heads[2]), heads[0])
    return plan_hopper(shape, **(given | change))


def test_layers_that_it_takes() -> None:
    assert planned(rows=8192) == TILES[128][-1][1]
    assert planned((28, 4, 128), 32, rows=130, sliding_window=512) == TILES[128][0][1]
    assert planned((8, 4, 256), causal=False) in [tile for _, tile in TILES[256]]
    for other in (
        {"heads": (4, 2, 80)},
        {"heads": (160, 1, 64)},
        {"block_size": 24},
        {"block_size": 4},
        {"dtype": torch.float32, "cache_dtype": torch.float32},
        {"cache_dtype": torch.int8},
        {"rows": 100},
        {"num_reqs": 300},
        {"sliding_window": 9, "causal": False},
        {"has_slopes": True},
    ):
        assert planned(**other) is None, other
    assert not has_gluon(torch.device("cpu"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The tiles it was launched with; at least one."""
    if not torch.cuda.is_available() or not has_gluon(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU, and a Triton that Gluon is known to work with")
    hopper = importlib.import_module("octavo.kernels.gpu.hopper_attention")
    found: list[Any] = []
    prefill = hopper.hopper_prefill

    def spied(*args: Any, **kwargs: Any) -> None:
        found.append(kwargs["tile"])
        prefill(*args, **kwargs)

    monkeypatch.setattr(hopper, "hopper_prefill", spied)
    yield found
    assert found


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    "heads", [(32, 8, 128), (32, 8, 64), (8, 4, 256), (28, 4, 128), (9, 3, 64), (4, 4, 64)]
)
def test_prefill_on_hopper(heads: tuple[int, int, int], pdl: bool, calls: list[Any]) -> None:
    gpu.set_pdl(pdl)
    try:
        check_attention(torch.bfloat16, heads, 16, [1, 5, 67, 300], [7, 200, 0, 40], 0)
        check_attention(torch.bfloat16, heads, 16, [1, 1, 700, 9], [9, 70, 1000, 0], 2)
        lens, contexts = [1] * 30 + [240, 77], [33 * n for n in range(32)]
        check_attention(torch.bfloat16, heads, 16, lens, contexts, 0)
    finally:
        gpu.set_pdl(False)
    assert len(calls) == 3


# Options are independent of the block size: one tile each, or it would take long to compile them all.
CASES: list[tuple[dict[str, Any], int]] = [
    *(({"causal": False}, block_size) for block_size in (8, 32, 128, 256)),
    ({"window": 100}, 32),
    ({"window": 500, "softcap": 20.0}, 32),
    ({"has_sinks": True}, 32),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("options", "block_size"), CASES)
def test_prefill_on_hopper_with_options(
    options: dict[str, Any], block_size: int, calls: list[Any]
) -> None:
    lens, contexts = [300, 30, 411], [700, 90, 0]
    dtype = torch.float16 if "has_sinks" in options else torch.bfloat16
    check_attention(dtype, (16, 4, 128), block_size, lens, contexts, 0, **options)
    assert len(calls) == 1
