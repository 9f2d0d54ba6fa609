"""Grouped formats against their definition element by element, and their parts against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference, weights
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.formats.grouped import GROUPED_FORMATS
from octavo.kernels.gpu import moe as gpu_moe
from octavo.kernels.gpu import prepare as gpu
from octavo.kernels.weights import (
    Columns,
    Planes,
    Rows,
    dense,
    part_of,
    quantize,
    reordered,
    share,
    stack,
)

N, K = 10, 60


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, *, zero: bool = False, acts: bool = False, groups: int = 5) -> Planes:
    """Random planes; acts: columns belong to groups in no order."""
    bits = int(name[-1])
    planes: dict[str, Tensor] = {"scale": torch.randn(N, groups).half()}
    if name == "FP8":
        planes["q"] = torch.randn(N, K).to(torch.float8_e4m3fn)
    else:
        planes["q"] = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    if name in ("NF4", "FP4"):
        planes["codes"] = torch.randn(16)
    if zero:
        planes["zero"] = torch.randint(0, 2**bits, (N, groups), dtype=torch.uint8)
    if acts:
        planes["group"] = torch.randint(0, groups, (K,), dtype=torch.int32)
    return Planes(name, planes, (N, K))


def variants() -> list[Planes]:
    found = [make(name, acts=acts) for name in GROUPED_FORMATS for acts in (False, True)]
    integers = ("INT2", "INT3", "INT4", "INT8")
    found += [make(name, zero=True, acts=acts) for name in integers for acts in (False, True)]
    return [*found, make("INT8", groups=1), make("NF4", groups=K)]


def by_definition(weight: Planes) -> Tensor:
    planes, out = weight.planes, torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            groups = planes["scale"].shape[1]
            g = int(planes["group"][k]) if "group" in planes else k // (K // groups)
            value = float(planes["q"][n, k].float())
            if "codes" in planes:
                value = float(planes["codes"][int(value)])
            zero = int(planes["zero"][n, g]) if "zero" in planes else 0
            out[n, k] = (value - zero) * float(planes["scale"][n, g])
    return out


def test_every_element_is_as_defined() -> None:
    for weight in variants():
        assert torch.equal(weight.dequantize(), by_definition(weight)), weight.format


def test_all_floats_of_8_bits_are_decoded() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        q = torch.arange(256, dtype=torch.uint8).view(dtype)[None]
        found = Planes("FP8", {"q": q, "scale": torch.ones(1, 1)}, (1, 256)).dequantize()
        assert found.isnan().sum() == q.float().isnan().sum() > 0
        torch.testing.assert_close(found, q.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_together_are_the_whole(count: int) -> None:
    """Columns are split inside of groups too."""
    for weight in [*variants(), *(reordered(w, torch.randperm(N)) for w in variants())]:
        whole = dense(weight)
        for axis in (0, 1):
            bounds = [share(whole.shape[axis], i, count) for i in range(count)]
            parts = [part_of(weight, Rows((b,)) if axis == 0 else Columns(*b)) for b in bounds]
            assert torch.equal(torch.cat([dense(part) for part in parts], axis), whole)


def test_stacks_are_of_one_set_of_groups_and_codes() -> None:
    first = make("INT4", zero=True, acts=True)
    second = Planes("INT4", {**first.planes, "q": first.planes["q"].flip(0)}, (N, K))
    want = torch.cat([dense(first), dense(second)])
    assert torch.equal(dense(stack([first, second])), want)
    with pytest.raises(ValueError, match="other groups"):
        stack([first, make("INT4", zero=True, acts=True)])


def test_a_dense_weight_in_its_place_has_the_planes_dtype() -> None:
    for form in ("INT4", "FP8"):
        made = make(form)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = Planes(form, made.planes, (N, K), dtype=dtype)
            found = dense(weight)
            assert found.dtype == dtype
            assert torch.equal(found, by_definition(weight).to(dtype))
    with pytest.raises(ValueError, match="a dense weight is of"):
        Planes("INT4", make("INT4").planes, (N, K), dtype=torch.int8)


def test_large_weights_are_dequantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights._CHUNKS, "cpu", 3 * K)
    for weight in variants():
        ordered = reordered(weight, torch.randperm(N))
        assert torch.equal(dense(ordered), ordered.dequantize())


@pytest.mark.parametrize("prepare", [reference.prepare, cpu.prepare, gpu.prepare])
def test_parts_of_several_formats_are_one_weight(prepare: object) -> None:
    """As where a fused layer's parts disagree: each keeps its own numbers."""
    assert callable(prepare)
    for dtype in (torch.float32, torch.bfloat16):
        planes = [make(n, acts=n == "INT8") for n in ("INT4", "FP8", "NF4", "INT8")]
        parts = [Planes(p.format, p.planes, (N, K), dtype=dtype) for p in planes]
        want = torch.cat([*(by_definition(p) for p in parts), torch.ones(3, K)]).to(dtype)
        weight = prepare([*parts, torch.ones(3, K, dtype=dtype)])
        assert weight.shape == (4 * N + 3, K)
        assert weight.format == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        assert torch.equal(weight.dequantize(), want.float())


def test_a_packed_part_and_a_dequantized_one_are_one_weight() -> None:
    blocks, other = quantize(torch.randn(4, 32), "Q8_0"), make("INT4", groups=1)
    part = part_of(other, Columns(0, K))
    assert isinstance(part, Planes)
    narrow = Planes("INT4", {**part.planes, "q": part.planes["q"][:, :32]}, (N, 32))
    weight = cpu.prepare([blocks, narrow], exact=True)
    want = torch.cat([blocks.dequantize(), narrow.dequantize()])
    torch.testing.assert_close(weight.dequantize(), want)
    x = torch.randn(3, 32)
    torch.testing.assert_close(weight.linear(x), x @ want.t(), atol=1e-4, rtol=1e-4)


def test_experts_on_a_gpu_have_the_planes_dtype() -> None:
    planes = make("FP8").planes
    part = Planes("FP8", planes, (N, K), dtype=torch.bfloat16)
    down = torch.zeros(K, N, dtype=torch.bfloat16)
    experts = gpu_moe.prepare_experts([[part, part]] * 2, [down] * 2)
    assert experts.w13.dtype == torch.bfloat16
    assert torch.equal(experts.w13[1, N:].float(), by_definition(part).bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(N, K)}, "q is torch.float32"),
        ({"q": torch.zeros(N, K + 1, dtype=torch.uint8)}, r"q is torch.uint8 \[10, 61\]"),
        ({"scale": torch.zeros(N, 7)}, "60 columns are no 7 equal groups"),
        ({"scale": torch.zeros(N + 1, 5)}, r"scale is torch.float32 \[11, 5\]"),
        ({"zero": torch.zeros(N, 4, dtype=torch.uint8)}, r"zero is torch.uint8 \[10, 4\]"),
        ({"group": torch.full((K,), 5, dtype=torch.int32)}, "groups outside of 5"),
        ({"group": torch.zeros(K, dtype=torch.int64)}, "group is torch.int64"),
        ({"codes": torch.zeros(16).half()}, "codes is torch.float16"),
        ({"offset": torch.zeros(1)}, "has planes q, scale"),
    ],
)
def test_planes_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planes("INT4", {**make("INT4").planes, **change}, (N, K))
