"""Weights kept quantized on a GPU against their own dequantized numbers, at odd shapes.

As in test_gpu: interpreted without a GPU, where float16 stands in for bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference  # noqa: E402
from octavo.kernels.gpu import w4  # noqa: E402
from octavo.kernels.gpu.gemv_fp8 import GemvFp8Config, gemv_fp8  # noqa: E402
from octavo.kernels.gpu.gemv_w4 import GemvW4Config, gemv_w4  # noqa: E402
from octavo.kernels.gpu.linear import GpuWeight  # noqa: E402
from octavo.kernels.gpu.linear_fp8 import Fp8Weight  # noqa: E402
from octavo.kernels.gpu.linear_quantized import QuantizedWeight  # noqa: E402
from octavo.kernels.gpu.linear_w4 import W4Weight  # noqa: E402
from octavo.kernels.gpu.linear_w8 import W8Weight  # noqa: E402
from octavo.kernels.gpu.quantize_fp8 import FP8, quantize_rows  # noqa: E402
from octavo.kernels.gpu.skinny_8bit import Skinny8BitConfig, skinny_8bit  # noqa: E402
from octavo.kernels.gpu.skinny_w4 import SkinnyW4Config, skinny_w4  # noqa: E402
from octavo.kernels.routing import Routing  # noqa: E402
from octavo.kernels.weights import Norm, Planes, quantize  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of activations rounded to 8 bits; the interpreter cuts where a GPU rounds.
FP8_ERROR = 0.035 if torch.cuda.is_available() else 0.08


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN (integers: a large negative), so an unwritten output shows."""
    empty = torch.empty

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == FP8:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    assert out.shape == want.shape
    return float((out.double() - want.double()).norm() / want.double().norm())


def make_w4(n: int, k: int, size: int, kind: str, scale_dtype: torch.dtype = HALF) -> w4.W4:
    q = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    scale = (randn(n, k // size, dtype=torch.float32) * 0.02).to(scale_dtype)
    zero = None
    if kind == "zero":
        zero = torch.randint(0, 16, scale.shape, device=DEVICE, dtype=torch.uint8)
    elif kind == "add":
        zero = randn(*scale.shape, dtype=scale_dtype) * 0.1
    group = w4.group_of(size)
    assert group is not None
    return replace(w4.pack(q, scale, zero, group), codes=CODES if kind == "codes" else None)


def make_fp8(n: int, k: int, blocked: bool) -> Fp8Weight:
    q = randn(n, k).to(FP8)
    shape = (-(-n // 128), -(-k // 128)) if blocked else (n,)
    return Fp8Weight(q, torch.rand(shape, device=DEVICE) + 0.1)


# As of a file's table: of no form that has bits of its own, and float16's and bfloat16's numbers.
CODES = tuple((i - 7) * abs(i - 7) / 64 for i in range(16))
W4_SHAPES = [(37, 256, 32), (70, 96, 32), (40, 512, 128), (33, 768, 64), (5, 64, 16), (9, 512, 256)]


@pytest.mark.parametrize("kind", ["", "zero", "add", "codes"])
@pytest.mark.parametrize(("n", "k", "size"), W4_SHAPES)
def test_w4_is_unpacked_as_it_was_packed(n: int, k: int, size: int, kind: str) -> None:
    q = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    scale = randn(n, k // size)
    zero: torch.Tensor | None = None
    if kind in ("zero", "add"):
        zero = torch.randint(0, 16, scale.shape, device=DEVICE)
        zero = zero.to(HALF) if kind == "add" else zero
    group = w4.group_of(size)
    assert group is not None
    weight = replace(w4.pack(q, scale, zero, group), codes=CODES if kind == "codes" else None)
    values, of_groups = q.float().view(n, -1, size), scale.float()[:, :, None]
    if kind == "codes":
        values = torch.tensor(CODES, device=DEVICE).half().float()[q.int()].view(n, -1, size) + 8
    offset = torch.full_like(of_groups, 8) if zero is None else zero.float()[:, :, None]
    want = values * of_groups + offset if kind == "add" else (values - offset) * of_groups
    assert torch.equal(w4.unpack(weight), want.view(n, k))
    assert weight.zero == kind
    found = W4Weight(weight)
    assert torch.equal(found.dequantize(), want.view(n, k))
    ids = torch.tensor([n - 1, 0, -1, n], dtype=torch.int32, device=DEVICE)
    rows = torch.cat([want.view(n, k)[[n - 1, 0]], torch.zeros(2, k, device=DEVICE)])
    assert torch.equal(found.rows(ids, 2.0), rows * 2)


@pytest.mark.parametrize("kind", ["", "zero", "add", "codes"])
@pytest.mark.parametrize(
    ("n", "k", "size", "rows", "split"),
    [
        (37, 256, 32, 1, 1),
        (70, 96, 32, 5, 2),
        (40, 512, 128, 19, 1),
        (33, 768, 64, 3, 2),
        (5, 64, 16, 2, 1),
    ],
)
def test_skinny_w4(n: int, k: int, size: int, rows: int, split: int, kind: str) -> None:
    weight = make_w4(n, k, size, kind, torch.bfloat16 if size == 64 else torch.float16)
    x, bias, residual = randn(rows, k), randn(n), randn(rows, n)
    want = x.float() @ w4.unpack(weight).T + bias.float() + residual.float()
    y = torch.empty(rows, n, dtype=HALF, device=DEVICE)
    config = SkinnyW4Config(16, split, 2 if size == 32 else 1, 4, 2, size < 64)
    skinny_w4(x, weight, bias, y, residual=residual, config=config)
    assert error_of(y, want) < TOLERANCE[HALF]


@pytest.mark.parametrize("kind", ["", "zero", "add"])
@pytest.mark.parametrize(("n", "k", "size"), [(38, 96, 32), (6, 64, 16), (20, 640, 128)])
def test_gemv_w4(n: int, k: int, size: int, kind: str) -> None:
    """With a norm before it, a gate and a residual after it; in steps of a program."""
    weight = make_w4(n, k, size, kind)
    x, bias, norm = randn(1, k), randn(n), Norm(randn(k) + 1, 1e-5)
    y = torch.empty(1, n, dtype=torch.float32, device=DEVICE)
    gemv_w4(x, weight, None, y, config=GemvW4Config(8, 3, 1, True))
    assert error_of(y, x.float() @ w4.unpack(weight).T) < 5e-4
    floats = reference.prepare([w4.unpack(weight)])
    residual = randn(1, n // 2)
    want = floats.linear(
        x.float(), bias.float(), norm=Norm(norm.weight.float(), 1e-5), gate="silu",
        residual=residual.float(),
    )  # fmt: skip
    y = torch.empty(1, n // 2, dtype=torch.float32, device=DEVICE)
    gemv_w4(x, weight, bias, y, norm=norm, gate="silu", residual=residual)
    assert error_of(y, want) < 2e-3


FP8_SHAPES = [(37, 72), (130, 384), (300, 200), (5, 128)]


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(("n", "k"), FP8_SHAPES)
def test_gemv_fp8(n: int, k: int, blocked: bool) -> None:
    weight = make_fp8(n, k, blocked)
    x, bias, residual = randn(1, k), randn(n), randn(1, n)
    product = x.float() @ weight.dequantize().T
    for words in (32, 128):
        y = torch.empty(1, n, dtype=torch.float32, device=DEVICE)
        gemv_fp8(x, weight.q, weight.scales, None, y, config=GemvFp8Config(4, words, 4))
        assert error_of(y, product) < 1e-4
    gemv_fp8(x, weight.q, weight.scales, bias, residual, residual=(before := residual.clone()))
    assert error_of(residual, product + bias + before) < TOLERANCE[HALF]


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "rows", "split"), [(37, 72, 2, 1), (130, 384, 5, 2), (300, 200, 19, 2)]
)
def test_skinny_8bit(n: int, k: int, blocked: bool, rows: int, split: int) -> None:
    weight = make_fp8(n, k, blocked)
    x, bias, residual = randn(rows, k), randn(n), randn(rows, n)
    config = Skinny8BitConfig(16, 64, split, 4, 3)
    want = x.float() @ weight.dequantize().T + bias.float() + residual.float()
    y = torch.empty(rows, n, dtype=HALF, device=DEVICE)
    block = (128, 128) if blocked else (0, 0)
    skinny_8bit(
        x,
        None,
        weight.q,
        weight.scales,
        bias,
        y,
        scale_block=block,
        residual=residual,
        config=config,
    )
    assert error_of(y, want) < TOLERANCE[HALF]
    x8, scale = quantize_rows(x)
    want = (x8.float() * scale[:, None]) @ weight.dequantize().T
    skinny_8bit(x8, scale, weight.q, weight.scales, None, y, scale_block=block, config=config)
    assert error_of(y, want) < TOLERANCE[HALF]


@pytest.mark.parametrize("gate", ["", "silu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (3, 48), (2, 600)])
def test_rows_are_rounded_to_their_largest(rows: int, width: int, gate: str) -> None:
    x = randn(rows, 2 * width if gate else width)
    x[0] = 0
    y, scale = quantize_rows(x, gate)
    want = x.float()
    if gate:
        want = torch.nn.functional.silu(want[:, :width]) * want[:, width:]
    torch.testing.assert_close(scale, (want.abs().amax(1) / 448).clamp(min=1e-12 / 448))
    assert y.dtype == FP8
    assert not y[0].float().any()
    if rows > 1:
        assert error_of(y.float() * scale[:, None], want) < FP8_ERROR


def weights_of(n: int, k: int) -> list[QuantizedWeight]:
    made: list[QuantizedWeight] = [make_fp8(n, k, blocked) for blocked in (False, True)]
    made += [W4Weight(make_w4(n, k, 32, kind)) for kind in ("", "zero", "add")]
    q = torch.randint(-128, 128, (n, k), device=DEVICE, dtype=torch.int8)
    made += [W8Weight(q, torch.rand(n, device=DEVICE) / 99, 0)]
    made += [W8Weight(q, (torch.rand(n, k // 32, device=DEVICE) / 99).half(), 32)]
    order = torch.randperm(k, device=DEVICE)
    return [*made, W4Weight(make_w4(n, k, 32, "zero"), order)]


@pytest.mark.parametrize("rows", [1, 3, 40, 140])
def test_linear_with_all_that_goes_with_it(rows: int) -> None:
    n, k = 48, 160
    for weight in weights_of(n, k):
        plain = reference.prepare([weight.dequantize()])
        x, bias, norm = randn(rows, k), randn(n), Norm(randn(k) + 1, 1e-5)
        options: list[dict[str, Any]] = [{}, {"norm": norm, "bias": bias}, {"gate": "silu"}]
        options += [{"bias": bias, "residual": randn(rows, n)}]
        options += [{"norm": norm, "gate": "silu", "residual": randn(rows, n // 2)}]
        for wanted in options:
            floats: dict[str, Any] = {"bias": None, **wanted}
            if "norm" in wanted:
                floats["norm"] = Norm(norm.weight.float(), norm.eps)
            for name in ("bias", "residual"):
                if floats.get(name) is not None:
                    floats[name] = floats[name].float()
                    wanted = {**wanted, name: wanted[name].clone()}
            want, out = plain.linear(x.float(), **floats), weight.linear(x, **wanted)
            assert out.dtype == HALF
            rounds = isinstance(weight, Fp8Weight) and rows == 40 and weight.scales.ndim == 1
            assert error_of(out, want) < (2 * FP8_ERROR if rounds else 2 * TOLERANCE[HALF])
        wide = weight.linear(x, out_dtype=torch.float32)
        assert wide.dtype == torch.float32


@pytest.mark.parametrize(("rows", "gate"), [(1, ""), (16, ""), (40, ""), (17, "silu")])
def test_rounding_takes_the_norm_of_a_sum_along(rows: int, gate: str) -> None:
    n, k = 48, 160
    for weight in weights_of(n, k):
        plain = reference.prepare([weight.dequantize()])
        x, residual, bias = randn(rows, k), randn(rows, k), randn(n)
        norm, total = Norm(randn(k) + 1, 1e-5, 0.5), x.float() + residual.float()
        out = weight.linear_of_sum(x, residual, norm, bias, gate=gate)
        rounds = isinstance(weight, Fp8Weight) and weight.scales.ndim == 1 and rows > 16
        assert (out is not None) is rounds
        if out is not None:
            floats = Norm(norm.weight.float(), norm.eps, norm.weight_offset)
            want = plain.linear(total.to(HALF).float(), bias.float(), norm=floats, gate=gate)
            assert error_of(out, want) < 2 * FP8_ERROR
            torch.testing.assert_close(residual, total.to(HALF))


def test_linear_refuses() -> None:
    weight = make_fp8(48, 160, False)
    with pytest.raises(ValueError, match="x must be"):
        weight.linear(randn(2, 161))
    with pytest.raises(ValueError, match="bias must be"):
        weight.linear(randn(2, 160), randn(47))
    with pytest.raises(ValueError, match="unknown gated activation 'tanh'"):
        weight.linear(randn(2, 160), gate="tanh")
    with pytest.raises(ValueError, match="residual must be"):
        weight.linear(randn(2, 160), gate="silu", residual=randn(2, 48))
    assert weight.linear(randn(0, 160)).shape == (0, 48)


# -------------------------------------------------------------------------- from a file's planes


def int4(n: int, k: int, groups: int, *, signed: bool = False, **planes: torch.Tensor) -> Planes:
    q = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    if signed:
        q = (q.to(torch.int8) - 8).to(torch.int8)
    found = {"q": q, "scale": randn(n, groups) * 0.05, **planes}
    return Planes("INT4", found, (n, k), dtype=HALF)


def check_planes(parts: list[Planes], kind: type) -> Any:
    weight = gpu.prepare(parts)
    assert type(weight) is kind
    want = torch.cat([part.dequantize() for part in parts])
    assert error_of(weight.dequantize(), want) < 1e-6 + (kind is GpuWeight) * TOLERANCE[HALF]
    x = randn(3, want.shape[1])
    assert error_of(weight.linear(x), x.float() @ want.T) < TOLERANCE[HALF]
    return weight


def test_parts_of_4_bits_stay_so() -> None:
    def zero(n: int, groups: int) -> torch.Tensor:
        return torch.randint(0, 16, (n, groups), device=DEVICE, dtype=torch.uint8)

    eight = torch.full((10, 2), 8, dtype=torch.uint8, device=DEVICE)
    assert check_planes([int4(10, 64, 2, zero=eight)], W4Weight).w4.zero == ""
    assert check_planes([int4(10, 64, 2, signed=True)], W4Weight).w4.zero == ""
    assert check_planes([int4(10, 64, 2)], W4Weight).w4.zero == "zero"
    # Groups of several sizes, and one part with zero points.
    parts = [int4(10, 128, 1, signed=True), int4(6, 128, 4, zero=zero(6, 4)), int4(3, 128, 2)]
    assert check_planes(parts, W4Weight).w4.group == 32
    # No kernel for groups of 20.
    check_planes([int4(10, 60, 3)], GpuWeight)
    order = torch.randperm(10)
    part = int4(10, 64, 2, zero=zero(10, 2))
    check_planes([Planes("INT4", part.planes, (10, 64), order.to(DEVICE), HALF)], W4Weight)


def test_columns_in_another_order_are_sorted() -> None:
    group = (torch.arange(96, device=DEVICE) // 32)[torch.randperm(96, device=DEVICE)].int()
    assert check_planes([int4(10, 96, 3, group=group), int4(4, 96, 3, group=group)], W4Weight)
    # Groups of several sizes have no such layout, nor have parts in several orders.
    check_planes([int4(10, 96, 3, group=group.clamp(max=1))], GpuWeight)
    check_planes([int4(10, 96, 3, group=group), int4(4, 96, 3, group=group.flip(0))], GpuWeight)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_ggufs_kinds_of_4_bits_stay_so(kind: str) -> None:
    def part(n: int, order: torch.Tensor | None = None) -> Planes:
        if kind == "Q4_K":
            blocks = torch.randint(0, 256, (n, 144), dtype=torch.uint8)
            d = torch.tensor([0.01, 0.02]).half().view(torch.uint8)
            blocks[:, :4] = d
            planes = {"blocks": blocks.to(DEVICE)}
        else:
            planes = {"blocks": quantize(torch.randn(n, 256), kind).planes["blocks"].to(DEVICE)}
        return Planes(kind, planes, (n, 256), order, HALF)

    parts = [part(10), part(6, torch.randperm(6).to(DEVICE))]
    weight = gpu.prepare(parts)
    assert type(weight) is W4Weight
    assert weight.w4.zero == ("" if kind == "Q4_0" else "add")
    want = torch.cat([p.dequantize() for p in parts])
    assert error_of(weight.dequantize(), want) < (1e-3 if kind == "Q4_K" else 1e-6)
    for rows in (1, 3):
        x = randn(rows, 256)
        assert error_of(weight.linear(x), x.float() @ want.T) < TOLERANCE[HALF]


def test_integers_of_8_bits_stay_so() -> None:
    def part(n: int, groups: int, zero: int | None) -> Planes:
        q = torch.randint(0, 256, (n, 128), device=DEVICE, dtype=torch.uint8)
        found = {"q": q, "scale": randn(n, groups) * 0.01}
        if zero is not None:
            found["zero"] = torch.full((n, groups), zero, dtype=torch.uint8, device=DEVICE)
        else:
            found["q"] = q.view(torch.int8)
        return Planes("INT8", found, (n, 128), dtype=HALF)

    assert check_planes([part(10, 1, None), part(6, 1, 128)], W8Weight).scales.shape == (16,)
    assert check_planes([part(10, 2, 128), part(6, 4, None)], W8Weight).scales.shape == (16, 4)
    check_planes([part(10, 2, 127)], GpuWeight)
    blocks = quantize(torch.randn(10, 96), "Q8_0").planes["blocks"].to(DEVICE)
    found = check_planes([Planes("Q8_0", {"blocks": blocks}, (10, 96), dtype=HALF)], W8Weight)
    ids = torch.tensor([9, -1, 3], dtype=torch.int32, device=DEVICE)
    want = found.dequantize()[[9, 0, 3]]
    want[1] = 0
    assert torch.equal(found.rows(ids), want)


def fp8(n: int, k: int, scale: torch.Tensor, **planes: torch.Tensor) -> Planes:
    found = {"q": randn(n, k).to(FP8), "scale": scale.to(DEVICE), **planes}
    return Planes("FP8", found, (n, k), dtype=HALF)


def test_parts_of_8_bits_stay_so() -> None:
    rows = check_planes([fp8(10, 48, torch.rand(10, 1)), fp8(6, 48, torch.rand(6, 1))], Fp8Weight)
    assert rows.scales.shape == (16,)

    def blocks(n: int, columns: int) -> torch.Tensor:
        return (torch.rand(-(-n // 128), columns) + 0.1).repeat_interleave(128, 0)[:n].contiguous()

    ragged = (torch.arange(200, device=DEVICE) // 128).int()
    whole, last = (
        fp8(256, 200, blocks(256, 2), group=ragged),
        fp8(70, 200, blocks(70, 2), group=ragged),
    )
    assert check_planes([whole, last], Fp8Weight).scales.shape == (3, 2)
    # A block must not begin inside of another, and a scale is for all of its block.
    check_planes([last, whole], GpuWeight)
    check_planes([fp8(256, 200, torch.rand(256, 2), group=ragged)], GpuWeight)
    wide = Planes("FP8", {**whole.planes, "q": whole.planes["q"].float().to(torch.float8_e5m2)}, (256, 200), dtype=HALF)  # fmt: skip
    check_planes([wide], GpuWeight)


def e2m1(n: int, k: int, size: int) -> Planes:
    q = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-9, -3, (n, k // size), device=DEVICE).float()
    codes = torch.tensor(w4.E2M1, device=DEVICE)
    return Planes("INT4", {"q": q, "scale": scale, "codes": codes}, (n, k), dtype=HALF)


def test_floats_of_4_bits_stay_so() -> None:
    weight = check_planes([e2m1(10, 96, 32), e2m1(7, 96, 32)], W4Weight)
    assert weight.w4.zero == "e2m1"
    assert torch.equal(weight.floats(torch.float32), weight.dequantize())
    for rows in (1, 5):
        x = randn(rows, 96)
        assert error_of(weight.linear(x), x.float() @ weight.dequantize().T) < TOLERANCE[HALF]


def test_codes_of_4_bits_stay_so() -> None:
    """As nf4's, by whatever table a file has, unless its parts have several."""

    def part(n: int, factor: float) -> Planes:
        codes = torch.tensor(CODES, device=DEVICE) * factor
        return replace(e2m1(n, 128, 64), format="NF4", planes={**e2m1(n, 128, 64).planes, "codes": codes})  # fmt: skip

    weight = check_planes([part(10, 1.0), part(7, 1.0)], W4Weight)
    assert weight.w4.zero == "codes"
    assert not weight.adds_residual(1)
    assert torch.equal(weight.floats(torch.float32), weight.dequantize())
    x = randn(1, 128)
    assert error_of(weight.linear(x), x.float() @ weight.dequantize().T) < TOLERANCE[HALF]
    check_planes([part(10, 1.0), part(7, 2.0)], GpuWeight)


@pytest.mark.parametrize("kind", ["sym", "zero", "e2m1", "fp8", "fp8 blocks", "gguf"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_quantized_experts(kind: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    num_experts, top_k, d, f = 3, 2, 96, 64
    if kind == "fp8 blocks":
        d = f = 128

    def part(n: int, k: int) -> Planes:
        if kind == "e2m1":
            return e2m1(n, k, 32)
        if kind == "gguf":
            blocks = quantize(torch.randn(n, k), "Q4_1").planes["blocks"].to(DEVICE)
            return Planes("Q4_1", {"blocks": blocks}, (n, k), dtype=HALF)
        if kind == "fp8":
            return fp8(n, k, torch.rand(n, 1) * 0.1)
        if kind == "fp8 blocks":
            return fp8(n, k, torch.rand(1, 1).expand(n, 1).contiguous() * 0.1)
        zero = torch.randint(0, 16, (n, k // 32), device=DEVICE, dtype=torch.uint8)
        return int4(n, k, k // 32, signed=kind == "sym", **({"zero": zero} if kind == "zero" else {}))  # fmt: skip

    gate_up = [[part(f, d), part(f, d)] for _ in range(num_experts)]
    down = [part(d, f) for _ in range(num_experts)]
    experts = gpu.prepare_experts(gate_up, down)
    assert isinstance(experts.w13, Fp8Weight if "fp8" in kind else W4Weight)
    assert experts.num_elements == 3 * num_experts * d * f
    x, router = randn(tokens, d), randn(tokens, num_experts)
    w13 = torch.stack([torch.cat([p.dequantize() for p in parts]) for parts in gate_up])
    w2 = torch.stack([p.dequantize() for p in down])
    routing = Routing(top_k)
    want = reference.moe(x.float(), router.float(), w13, w2, routing)
    assert error_of(experts.mix(x, router, routing), want) < 3 * TOLERANCE[HALF]
    some = gpu.prepare_experts(gate_up[1:], down[1:])
    want = reference.moe(x.float(), router.float(), w13[1:], w2[1:], routing, first=1)
    assert error_of(some.mix(x, router, routing, first=1), want) < 3 * TOLERANCE[HALF]


def test_experts_of_several_forms_become_dense() -> None:
    down = [int4(96, 64, 2), fp8(96, 64, torch.rand(96, 1))]
    gate_up = [[int4(64, 96, 3), int4(64, 96, 3)] for _ in range(2)]
    assert isinstance(gpu.prepare_experts(gate_up, down).w13, torch.Tensor)


def test_float32_is_exact() -> None:
    part = int4(10, 64, 2)
    weight = gpu.prepare([Planes("INT4", part.planes, (10, 64))])
    assert weight.format == "F32"
    assert torch.equal(weight.dequantize(), part.dequantize())
