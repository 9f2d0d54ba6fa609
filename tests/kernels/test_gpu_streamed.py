"""The kernel of one row whose programs stay, at odd shapes, against float32 of the same numbers.

As in test_gpu: interpreted without a GPU, where float16 stands in for bfloat16.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference  # noqa: E402
from octavo.kernels.gpu import streamed  # noqa: E402
from octavo.kernels.gpu.gemv_streamed import gemv_streamed  # noqa: E402
from octavo.kernels.gpu.linear import GpuWeight  # noqa: E402
from octavo.kernels.gpu.streamed import StreamConfig, fit, stretch_of  # noqa: E402
from octavo.kernels.weights import Norm  # noqa: E402

linear_module = importlib.import_module("octavo.kernels.gpu.linear")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(HALF)


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    assert out.shape == want.shape
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("n", "k", "tile"), [(22, 80, (2, 1, 4, 3)), (10, 128, (1, 1, 4, 4)), (9, 200, (4, 1, 4, 2))]
)
def test_one_row(n: int, k: int, tile: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    config = StreamConfig(*tile)
    x, bias, norm = randn(1, k), randn(n), Norm(randn(k), 1e-5, 1.0)
    weight = randn(n, k)
    before = Norm(norm.weight.float(), norm.eps, norm.weight_offset)
    cases: list[dict[str, Any]] = [{}, {"norm": norm, "bias": bias, "residual": randn(1, n)}]
    if n % 2 == 0:
        cases += [{"gate": "silu"}]
        cases += [{"gate": "silu", "norm": norm, "bias": bias, "residual": randn(1, n // 2)}]
    for options in cases:
        options = {"bias": None, "residual": None, "norm": None, "gate": "", **options}
        floats = {
            name: value.float() if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        if options["norm"] is not None:
            floats["norm"] = before
        want = reference.linear(x.float(), weight.float(), floats.pop("bias"), **floats)
        y = torch.full_like(want, torch.nan)
        gemv_streamed(x, weight, options.pop("bias"), y, config=config, **options)
        assert error_of(y, want) < 1e-5


def test_programs_share_all_rows() -> None:
    device = torch.device("cpu")
    for n in (1, 7, 64, 1000, 6144):
        for config in (StreamConfig(2, 1, 4, 3), StreamConfig(8, 3, 8, 5)):
            for gated in (False, True):
                stretch = stretch_of(n, config, gated, device)
                assert (stretch.programs - 1) * stretch.rows < n <= stretch.programs * stretch.rows
                assert stretch.rows % config.block_n == 0
                assert stretch.steps * config.block_n >= stretch.rows
                assert not gated or stretch.rows % 2 == 0


def test_a_tile_is_cut_to_a_programs_rows_and_memory() -> None:
    device = torch.device("cpu")
    tile = StreamConfig(8, 1, 4, 9)
    assert fit(tile, 1 << 10, 100_000, device) == tile
    assert fit(tile, 1 << 10, 8, device) == StreamConfig(2, 1, 4, 2)
    assert fit(tile, 64 << 10, 100_000, device) == StreamConfig(2, 1, 4, 2)


def test_linear_takes_the_tile_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With norm, gate and residual in one launch; and the other kernel where there is no tile."""
    launched: list[str] = []
    for name in ("gemv_streamed", "gemv"):
        run = getattr(linear_module, name)

        def note(*args: Any, _name: str = name, _run: Any = run, **options: Any) -> Any:
            launched.append(_name)
            return _run(*args, **options)

        monkeypatch.setattr(linear_module, name, note)
    n, k = 24, 64
    monkeypatch.setattr(linear_module, "MAX_FUSED_SIZE", n - 1)
    weight = GpuWeight(randn(n, k))
    x, residual, norm = randn(1, k), randn(1, n // 2), Norm(randn(k), 1e-5)
    monkeypatch.setattr(streamed, "MIN_ROW_BYTES", 0)
    for least, name in ((1 << 60, "gemv"), (0, "gemv_streamed")):
        monkeypatch.setattr(streamed, "MIN_BYTES", least)
        assert weight.adds_residual(1) is (least == 0)
        assert not weight.adds_residual(2)
        before = residual.clone()
        out = weight.linear(x, norm=norm, gate="silu", residual=residual)
        floats = Norm(norm.weight.float(), norm.eps)
        want = reference.linear(
            x.float(), weight.dequantize(), norm=floats, gate="silu", residual=before.float()
        )
        assert error_of(out, want) < 1e-2
        assert weight.linear(x, out_dtype=torch.float32).dtype == torch.float32
        assert launched == [name, name]
        launched.clear()
    device = torch.device(DEVICE)
    assert streamed.plan_streamed(n, k + 4, device) is None
    assert streamed.plan_streamed(n, 1 << 15, device) is None
