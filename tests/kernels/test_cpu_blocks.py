"""Grouped weights on the CPU: packed in about their file's size where groups are whole blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo import _core
from octavo.kernels import reference as ref
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.blocks import as_rows, column_order
from octavo.kernels.weights import Columns, Planes, part_of, reordered

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
# As bitsandbytes stores it.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scales(n: int, groups: int) -> Tensor:
    """Of either sign."""
    return (torch.rand(n, groups) * 0.1 + 0.01) * torch.where(torch.rand(n, groups) < 0.5, -1, 1)


def integers(
    bits: int, size: int, *, signed: bool = False, zero: bool = True
) -> Callable[..., Planes]:
    def make(n: int, k: int) -> Planes:
        groups = k // (size or k)
        half = 2 ** (bits - 1)
        q = torch.randint(0, 2**bits, (n, k))
        planes = {"scale": scales(n, groups).bfloat16()}
        planes["q"] = (q - half).to(torch.int8) if signed else q.to(torch.uint8)
        if zero:
            planes["zero"] = torch.randint(0, 2**bits, (n, groups)) - (half if signed else 0)
        return Planes(f"INT{bits}", planes, (n, k))

    return make


def fp8(size: int) -> Callable[..., Planes]:
    def make(n: int, k: int) -> Planes:
        q = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        q[q & 0x7F == 0x7F] = 1  # the smallest, in place of what is no number
        planes = {"q": q.view(torch.float8_e4m3fn), "scale": scales(n, k // (size or k)) / 100}
        return Planes("FP8", planes, (n, k))

    return make


def fp4(size: int, *, power: bool) -> Callable[..., Planes]:
    def make(n: int, k: int) -> Planes:
        scale = scales(n, k // size)
        if power:
            scale = torch.exp2(torch.randint(-8, 3, scale.shape))
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        return Planes("FP4", {"q": q, "scale": scale, "codes": E2M1}, (n, k))

    return make


def nf4(n: int, k: int) -> Planes:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return Planes("NF4", {"q": q, "scale": scales(n, k // 64), "codes": NF4}, (n, k))


# A weight -> its maker, the kind that it is packed as, and bits of an element there.
CASES: dict[str, tuple[Callable[..., Planes], str, float]] = {
    "w4-g32": (integers(4, 32), "INT4_32", 4 + 40 / 32),
    "w4-g64": (integers(4, 64), "INT4_32", 4 + 40 / 32),
    "w4-g128": (integers(4, 128), "INT4_128", 4 + 40 / 128),
    "w4-signed": (integers(4, 128, signed=True, zero=False), "INT4_128", 4 + 40 / 128),
    "w4-row": (integers(4, 0, signed=True), "INT4_128", 4 + 40 / 128),
    "w2": (integers(2, 32), "INT4_32", 4 + 40 / 32),
    "w3": (integers(3, 128, signed=True, zero=False), "INT4_128", 4 + 40 / 128),
    "w8": (integers(8, 128), "INT8_128", 8 + 40 / 128),
    "w8-signed": (integers(8, 32, signed=True, zero=False), "INT8_32", 8 + 40 / 32),
    "w8-row": (integers(8, 0, signed=True), "INT8_128", 8 + 40 / 128),
    "fp8-row": (fp8(0), "FP8_128", 8 + 32 / 128),
    "fp8-g32": (fp8(32), "FP8_32", 8 + 32 / 32),
    "nvfp4": (fp4(16, power=False), "FP4_16", 4 + 64 / 32),
    "mxfp4": (fp4(32, power=True), "MXFP4", 4 + 8 / 32),
    "nf4": (nf4, "NF4_64", 4 + 32 / 64),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 45])
def test_a_weight_is_computed_with_as_it_is(case: str, rows: int) -> None:
    make, kind, bits = CASES[case]
    for n, k in [(1, 128), (19, 384), (97, 256)]:
        weight = reordered(make(n, k), torch.randperm(n))
        assert isinstance(weight, Planes)
        found = as_rows(weight, None)
        assert found is not None
        assert found.kind == kind
        want, x = weight.dequantize(), torch.randn(rows, k)
        y = ref.linear(x, want)
        for level in _core.cpu_levels():
            packed = cpu.prepare([weight], level=level)
            exact = cpu.prepare([weight], exact=True, level=level)
            assert packed.format == weight.format
            error = (packed.dequantize() - want).abs().max()
            assert error <= 3e-7 * want.abs().max()
            if n > 1:
                # Activations keep 12 bits, on the tile unit weights those of bfloat16.
                assert (packed.linear(x) - y).norm() < 3e-3 * y.norm(), level
            assert (exact.linear(x) - y).norm() <= 1e-5 * y.norm(), level
        lanes = 32
        panels = -(-n // lanes) * lanes
        assert cpu.prepare([weight]).nbytes <= panels * k * bits / 8


@pytest.mark.parametrize("level", _core.cpu_levels())
@pytest.mark.parametrize("case", CASES)
def test_all_elements_at_their_largest(case: str, level: str) -> None:
    """Nothing saturates on the way; activations on the int8 grid make sums exact."""
    make, _, _ = CASES[case]
    for extreme in range(3):
        weight = make(16, 128)
        q, low, high = weight.planes["q"], weight.planes["q"].clone(), weight.planes["q"].clone()
        if q.dtype == torch.float8_e4m3fn:
            low, high = low.float().fill_(-448).to(q.dtype), high.float().fill_(448).to(q.dtype)
        else:
            low.fill_(int(q.min())), high.fill_(int(q.max()))
        planes = dict(weight.planes) | {"q": (low, high, q)[extreme]}
        weight = Planes(weight.format, planes, weight.shape)
        for value in (127.0, -127.0):
            x = torch.full((3, 128), value)
            y = ref.linear(x, weight.dequantize())
            error = (cpu.prepare([weight], level=level).linear(x) - y).abs().max()
            size = weight.dequantize().abs().sum(1).max() * 127
            assert error <= 2e-6 * size


def with_order(weight: Planes, size: int) -> Planes:
    """The same numbers in columns that belong to their groups in no order."""
    n, k = weight.shape
    order = torch.randperm(k)
    group = (torch.arange(k) // size)[order].to(torch.int32)
    planes = dict(weight.planes) | {"q": weight.planes["q"][:, order], "group": group}
    return Planes(weight.format, planes, (n, k))


@pytest.mark.parametrize("level", _core.cpu_levels())
def test_columns_in_activation_order(level: str) -> None:
    """A stack of parts with one order, one with another, one with none, and a dense one."""
    first = with_order(integers(4, 64)(24, 256), 64)
    same = Planes(
        "INT4", dict(integers(4, 64)(9, 256).planes) | {"group": first.planes["group"]}, (9, 256)
    )
    other = with_order(integers(8, 128)(7, 256), 128)
    parts = [first, same, other, integers(4, 32)(5, 256), torch.randn(3, 256)]
    order = column_order(first)
    assert order is not None
    assert as_rows(first, order) is not None
    assert as_rows(same, order) is not None
    want = torch.cat([p if isinstance(p, Tensor) else p.dequantize() for p in parts])
    weight = cpu.prepare(parts, exact=True, level=level)
    rounded = want.clone()
    # Parts of other orders are dense, in bfloat16 where none is asked for.
    torch.testing.assert_close(weight.dequantize(), rounded, atol=1e-6, rtol=1e-6)
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16), (45, torch.float32)):
        x = torch.randn(rows, 256).to(dtype)
        y = ref.linear(x, want, out_dtype=torch.float32)
        found = weight.linear(x, out_dtype=torch.float32)
        assert (found - y).norm() < 1e-5 * y.norm()
    ids = torch.tensor([40, 0, 23], dtype=torch.int32)
    torch.testing.assert_close(weight.rows(ids, out_dtype=torch.float32), want[ids.long()])


def test_what_has_no_blocks_is_dense() -> None:
    e5m2 = Planes(
        "FP8", {"q": torch.randn(4, 64).to(torch.float8_e5m2), "scale": torch.ones(4, 1)}, (4, 64)
    )
    not_a_number = fp8(0)(4, 64)
    not_a_number.planes["q"].view(torch.uint8)[0, 0] = 0x7F
    other_codes = Planes("NF4", dict(nf4(4, 64).planes) | {"codes": NF4 * 1.01}, (4, 64))
    for weight in (
        integers(4, 48)(4, 96),
        with_order(integers(4, 40)(4, 80), 40),
        with_order(fp8(8)(4, 64), 8),
        e5m2,
        not_a_number,
        other_codes,
        fp4(8, power=False)(4, 64),
    ):
        assert as_rows(weight, column_order(weight)) is None
        found = cpu.prepare([weight]).dequantize()
        torch.testing.assert_close(found, weight.dequantize(), equal_nan=True)


def test_ragged_groups_and_parts_inside_of_groups_are_blocks() -> None:
    """As of FP8's blocks of 128 in rows of 320, and a shard's columns."""
    weight = fp8(128)(4, 384)
    part = part_of(weight, Columns(32, 352))
    assert isinstance(part, Planes)
    found = as_rows(part, None)
    assert found is not None
    assert found.kind == "FP8_32"
    torch.testing.assert_close(cpu.prepare([part]).dequantize(), part.dequantize())
