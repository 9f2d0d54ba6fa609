"""Ops of layers with a state against the reference: odd shapes, mixed steps, padding.

Triton's are interpreted without a GPU, as in ``test_gpu``. The states of no request are NaN before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference_recurrent as reference  # noqa: E402
from octavo.kernels.recurrent import Steps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# The interpreter takes its time.
DTYPES = (torch.float32, pytest.param(HALF, marks=pytest.mark.slow))
# Of outputs rounded to these types; states are float32, computed from inputs of these types, where
# a GPU's products of half precision inputs have 10 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
STATE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}


class Step(NamedTuple):
    """A step for both, and which rows of tokens and of states are somebody's."""

    steps: Steps
    num_tokens: int
    tokens: list[int]
    rows: list[int]


def make_step(requests: list[tuple[int, int, int]], num_decodes: int) -> Step:
    """Requests (row of the states, tokens before, tokens of the step); 0 tokens: padding."""

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    starts, tokens = [0], []
    for r, (_row, _before, count) in enumerate(requests):
        tokens += range(starts[-1], starts[-1] + count)
        # A decode that is padding has a token row all the same.
        starts.append(starts[-1] + (1 if r < num_decodes else count))
    steps = Steps(
        ints([row for row, _, _ in requests]),
        ints([0 if count == 0 else before + count for _, before, count in requests]),
        ints(starts),
        num_decodes,
        max(count for _, _, count in requests),
    )
    return Step(steps, starts[-1], tokens, [row for row, _, count in requests if count])


# Decodes that go on and one that begins, padding, chunks that begin and go on, shorter than a
# convolution, of one tile, of several.
STEPS = {
    "decodes": make_step([(3, 5, 1), (0, 0, 1), (6, 0, 0), (2, 70, 1)], 4),
    "prefills": make_step([(1, 0, 37), (4, 9, 2), (6, 0, 0), (0, 16, 16), (5, 0, 1)], 0),
    "both": make_step([(2, 3, 1), (6, 0, 0), (4, 0, 50), (1, 33, 3)], 2),
}
NUM_ROWS = 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def sliced(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns of wider rows, as parts of one projection are."""
    return randn(rows, columns + 11, dtype=dtype)[:, 3 : 3 + columns]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def compare(
    name: str, step: Step, state: torch.Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any
) -> None:
    """Run both on copies of the state, which is NaN in everybody else's rows."""
    own = torch.full_like(state, float("nan"))
    own[step.rows] = state[step.rows]
    states = [own.clone(), own.clone()]
    outs = [
        getattr(ops, name)(*args, s, step.steps, **kwargs)
        for ops, s in zip((gpu.RECURRENT_OPS, reference), states, strict=True)
    ]
    found, expected = (out[step.tokens] for out in outs)
    assert error(found, expected) < TOLERANCE[dtype]
    found, expected = (s[step.rows] for s in states)
    assert error(found, expected) < STATE_TOLERANCE[dtype]
    others = [row for row in range(NUM_ROWS) if row not in step.rows]
    assert states[0][others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("channels", "width"), [(300, 4), (7, 2), (64, 3)])
def test_convolutions(kind: str, channels: int, width: int, dtype: torch.dtype) -> None:
    step = STEPS[kind]
    state = randn(NUM_ROWS, channels, width - 1, dtype=dtype)
    weight, bias = randn(channels, width, dtype=dtype), randn(channels, dtype=dtype)
    x = sliced(step.num_tokens, channels, dtype)
    for activation, with_bias in (("silu", bias), ("", None)):
        compare("causal_conv", step, state, dtype, x, weight, with_bias, activation=activation)
    x = randn(step.num_tokens, 3 * channels, dtype=dtype)
    for with_bias in (bias, None):
        compare("short_conv", step, state, dtype, x, weight, with_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("hk", "hv", "dk", "dv"), [(2, 4, 24, 20), (1, 1, 128, 70), (3, 3, 16, 8)])
def test_gated_delta_rule(
    kind: str, hk: int, hv: int, dk: int, dv: int, dtype: torch.dtype
) -> None:
    step = STEPS[kind]
    compare(
        "gated_delta_rule",
        step,
        randn(NUM_ROWS, hv, dk, dv),
        dtype,
        sliced(step.num_tokens, 2 * hk * dk + hv * dv, dtype),
        3 * sliced(step.num_tokens, hv, dtype),
        sliced(step.num_tokens, hv, dtype),
        -torch.rand(hv, device=DEVICE),
        randn(hv),
        num_key_heads=hk,
        beta_scale=2.0 if hk == 3 else 1.0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("heads", "dk", "dv"), [(2, 24, 20), pytest.param(1, 32, 70, marks=pytest.mark.slow)]
)
def test_gated_delta_rule_of_rows(
    kind: str, heads: int, dk: int, dv: int, dtype: torch.dtype
) -> None:
    step = STEPS[kind]
    compare(
        "gated_delta_rule",
        step,
        randn(NUM_ROWS, heads, dk, dv),
        dtype,
        sliced(step.num_tokens, 2 * heads * dk + heads * dv, dtype),
        3 * sliced(step.num_tokens, heads * dk, dtype),
        sliced(step.num_tokens, heads, dtype),
        -torch.rand(heads, device=DEVICE),
        randn(heads * dk),
        num_key_heads=heads,
    )


def test_the_rule_is_exact_where_keys_are_alike() -> None:
    """Equal keys without decay are the worst of what a chunk's system may be."""
    step = make_step([(0, 0, 40)], 0)
    key = randn(1, 16)
    qkv = torch.cat([randn(40, 16), key.expand(40, 16), randn(40, 8)], 1)
    weak, strong = torch.full((40, 1), -30.0), torch.full((40, 1), 30.0)
    decay, bias = -torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    inputs = (qkv, weak.to(DEVICE), strong.to(DEVICE), decay, bias)
    state = randn(NUM_ROWS, 1, 16, 8)
    compare("gated_delta_rule", step, state, torch.float32, *inputs, num_key_heads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("heads", "p", "groups", "size"), [(4, 20, 2, 24), (3, 64, 1, 128)])
def test_selective_scan(
    kind: str, heads: int, p: int, groups: int, size: int, dtype: torch.dtype
) -> None:
    step = STEPS[kind]
    for limits in ((0.0, math.inf), (0.2, 0.9)):
        compare(
            "selective_scan",
            step,
            randn(NUM_ROWS, heads, p, size),
            dtype,
            sliced(step.num_tokens, heads * p + 2 * groups * size, dtype),
            sliced(step.num_tokens, heads, dtype),
            -torch.rand(heads, device=DEVICE) * 2,
            randn(heads),
            randn(heads),
            num_groups=groups,
            dt_limits=limits,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("heads", "size"), [(3, 21), pytest.param(70, 16, marks=pytest.mark.slow)])
def test_selective_scan_of_columns(kind: str, heads: int, size: int, dtype: torch.dtype) -> None:
    step = STEPS[kind]
    compare(
        "selective_scan",
        step,
        randn(NUM_ROWS, heads, 1, size),
        dtype,
        sliced(step.num_tokens, heads + 2 * size, dtype),
        sliced(step.num_tokens, heads, dtype),
        -torch.rand(heads, size, device=DEVICE) * 2,
        randn(heads),
        randn(heads),
        num_groups=1,
        dt_limits=(0.0, math.inf),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_first", [False, True])
def test_gated_norm(gate_first: bool, dtype: torch.dtype) -> None:
    x, gate = randn(3, 4 * 30, dtype=dtype), sliced(3, 4 * 30, dtype)
    for weight in (randn(30, dtype=dtype), randn(120, dtype=dtype)):
        found, expected = (
            ops.gated_norm(x, gate, weight, 1e-5, group_size=30, gate_first=gate_first)
            for ops in (gpu.RECURRENT_OPS, reference)
        )
        assert error(found, expected) < TOLERANCE[dtype]


def test_copies_of_rows() -> None:
    for states in (randn(2, NUM_ROWS, 3, 1000), randn(1, NUM_ROWS, 5, 3, dtype=HALF)):
        rows = torch.tensor([3, 0, 3, 6, 1, 5], dtype=torch.int32, device=DEVICE)
        found, expected = states.clone(), states.clone()
        gpu.RECURRENT_OPS.copy_rows(found, rows)
        reference.copy_rows(expected, rows)
        assert torch.equal(found, expected)
        assert torch.equal(found[:, [6, 1, 5]], states[:, [3, 0, 3]])


def test_what_does_not_fit_is_refused() -> None:
    step = STEPS["decodes"]
    x, weight, state = randn(4, 10), randn(9, 3), randn(NUM_ROWS, 9, 2)
    with pytest.raises(ValueError, match="does not fit 9 channels"):
        gpu.RECURRENT_OPS.causal_conv(x, weight, None, state, step.steps)
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        gpu.RECURRENT_OPS.causal_conv(x[:, :9], weight, None, state, step.steps, activation="gelu")
    with pytest.raises(ValueError, match="qkv has 10 columns"):
        gpu.RECURRENT_OPS.gated_delta_rule(
            x, x, x, x, x, randn(NUM_ROWS, 1, 4, 4), step.steps, num_key_heads=1
        )
    with pytest.raises(ValueError, match="10 columns; 1 heads of 4"):
        gpu.RECURRENT_OPS.selective_scan(
            x,
            x,
            x[0],
            x,
            x,
            randn(NUM_ROWS, 1, 4, 4),
            step.steps,
            num_groups=1,
            dt_limits=(0.0, math.inf),
        )
