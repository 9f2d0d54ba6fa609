"""Ops of layers with a state in Rust against the reference: odd shapes, mixed steps, padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

cpu = pytest.importorskip("octavo.kernels.cpu.ops")
from octavo.kernels import reference_recurrent as reference  # noqa: E402
from octavo.kernels.cpu.recurrent import RECURRENT_OPS  # noqa: E402
from octavo.kernels.recurrent import Steps  # noqa: E402

NUM_ROWS = 7


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Decodes that go on and begin, padding, chunks that begin and go on, one shorter than the taps.
STEPS = Steps(
    ints(3, 0, 6, 2, 1, 4), ints(6, 1, 0, 37, 40, 11), ints(0, 1, 2, 3, 40, 43, 45), 3, 37
)
ROWS, TOKENS = [3, 0, 2, 1, 4], [0, 1, *range(3, 45)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sliced(columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(45, columns + 11).to(dtype)[:, 3 : 3 + columns]


def compare(name: str, state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    own = torch.full_like(state, float("nan"))
    own[ROWS] = state[ROWS]
    states = [own.clone(), own.clone()]
    outs = [
        getattr(ops, name)(*args, s, STEPS, **kwargs)
        for ops, s in zip((RECURRENT_OPS, reference), states, strict=True)
    ]
    for found, expected in ([out[TOKENS] for out in outs], [s[ROWS] for s in states]):
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-5, error
    assert states[0][[5, 6]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "width"), [(150, 4), (7, 2), (64, 8), (5, 9)])
def test_convolutions(channels: int, width: int, dtype: torch.dtype) -> None:
    state = torch.randn(NUM_ROWS, channels, width - 1).to(dtype)
    weight, bias = torch.randn(channels, width).to(dtype), torch.randn(channels).to(dtype)
    x = sliced(channels, dtype)
    for activation, with_bias in (("silu", bias), ("", None)):
        compare("causal_conv", state, x, weight, with_bias, activation=activation)
    compare("short_conv", state, sliced(3 * channels, dtype), weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hk", "hv", "dk", "dv"), [(2, 4, 24, 20), (1, 1, 128, 70), (3, 3, 16, 8)])
def test_gated_delta_rule(hk: int, hv: int, dk: int, dv: int, dtype: torch.dtype) -> None:
    compare(
        "gated_delta_rule",
        torch.randn(NUM_ROWS, hv, dk, dv),
        sliced(2 * hk * dk + hv * dv, dtype),
        # Beyond 20 the softplus is its argument.
        10 * sliced(hv, dtype),
        sliced(hv, dtype),
        -torch.rand(hv),
        torch.randn(hv),
        num_key_heads=hk,
        beta_scale=2.0 if hk == 3 else 1.0,
    )


@pytest.mark.parametrize(("heads", "dk", "dv"), [(2, 24, 20), (1, 128, 70)])
def test_gated_delta_rule_of_rows(heads: int, dk: int, dv: int) -> None:
    compare(
        "gated_delta_rule",
        torch.randn(NUM_ROWS, heads, dk, dv),
        sliced(2 * heads * dk + heads * dv, torch.float32),
        10 * sliced(heads * dk, torch.float32),
        sliced(heads, torch.float32),
        -torch.rand(heads),
        torch.randn(heads * dk),
        num_key_heads=heads,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "p", "groups", "size"), [(4, 20, 2, 24), (3, 64, 1, 128)])
def test_selective_scan(heads: int, p: int, groups: int, size: int, dtype: torch.dtype) -> None:
    for limits in ((0.0, math.inf), (0.2, 0.9)):
        compare(
            "selective_scan",
            torch.randn(NUM_ROWS, heads, p, size),
            sliced(heads * p + 2 * groups * size, dtype),
            sliced(heads, dtype),
            -2 * torch.rand(heads),
            torch.randn(heads),
            torch.randn(heads),
            num_groups=groups,
            dt_limits=limits,
        )


@pytest.mark.parametrize(("heads", "p", "size"), [(70, 1, 16), (3, 1, 21), (2, 5, 33)])
def test_selective_scan_of_columns(heads: int, p: int, size: int) -> None:
    compare(
        "selective_scan",
        torch.randn(NUM_ROWS, heads, p, size),
        sliced(heads * p + 2 * size, torch.float32),
        sliced(heads, torch.float32),
        -2 * torch.rand(heads, size),
        torch.randn(heads),
        torch.randn(heads),
        num_groups=1,
        dt_limits=(0.0, math.inf),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gated_norm(rows: int, gate_first: bool, dtype: torch.dtype) -> None:
    x, gate = torch.randn(rows, 120).to(dtype), sliced(120, dtype)[:rows]
    given = x.clone(), gate.clone()
    for weight in (torch.randn(30).to(dtype), torch.randn(120).to(dtype)):
        found, expected = (
            ops.gated_norm(x, gate, weight, 1e-5, group_size=30, gate_first=gate_first)
            for ops in (RECURRENT_OPS, reference)
        )
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(x, given[0])
    assert torch.equal(gate, given[1])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, state = torch.randn(45, 9), torch.randn(9, 3), torch.randn(NUM_ROWS, 9, 2)
    with pytest.raises(ValueError, match="slot 6 is outside 5 rows"):
        RECURRENT_OPS.causal_conv(x, weight, None, state[:5], STEPS)
    with pytest.raises(ValueError, match="tokens up to 45 of 44"):
        RECURRENT_OPS.causal_conv(x[:44], weight, None, state, STEPS)
    with pytest.raises(ValueError, match="shape"):
        RECURRENT_OPS.causal_conv(x, weight, None, state[:, :8].contiguous(), STEPS)
    with pytest.raises(ValueError, match="state must be contiguous float32"):
        RECURRENT_OPS.causal_conv(x, weight, None, state.half(), STEPS)
