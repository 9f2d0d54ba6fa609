"""kernels/cpu against reference.py: every op and kind at odd shapes, at this process's level.

The same file runs at the other levels in child processes (OCTAVO_CPU_LEVEL), since a process reads
it once. Outputs are new memory, which torch fills with NaN here, so what is not written shows.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from gguf_blocks import PACKED_KINDS, random_blocks, set_halves
from levels import OTHER_LEVELS, run_at_level
from octavo import _core
from octavo.kernels import reference as ref
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.linear import CpuWeight
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.routing import Routing
from octavo.kernels.weights import ExpertBiases, Norm, Planes, Stored, quantize

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def close(got: torch.Tensor, want: torch.Tensor, tol: float | None = None) -> None:
    """Within tol of the largest magnitude, elementwise."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if not want.numel():
        return
    tol = TOLERANCE[want.dtype] if tol is None else tol
    scale = want.float().abs().max().clamp(min=1e-6)
    error = (got.float() - want.float()).abs().max() / scale
    assert error <= tol, f"error {error:.2e}"


def prepare(weight: Stored | Sequence[Stored], **options: Any) -> CpuWeight:
    """One weight, or several stacked."""
    return cpu.prepare([weight] if isinstance(weight, Stored) else weight, **options)


def linear(x: torch.Tensor, weight: CpuWeight, *args: Any, **options: Any) -> torch.Tensor:
    return weight.linear(x, *args, **options)


def make_blocks(
    data: torch.Tensor, name: str, shape: tuple[int, int], order: torch.Tensor | None = None
) -> Planes:
    return Planes(name, {"blocks": data.reshape(shape[0], -1)}, shape, order)


def odd_address(t: torch.Tensor) -> torch.Tensor:
    """The same values one element further than an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


# ----------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 17, 64, 131])
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_plain(dtype: torch.dtype, rows: int) -> None:
    for n, k in [(1, 1), (7, 33), (40, 64), (97, 300), (16, 1031)]:
        w = torch.randn(n, k).to(dtype)
        bias = torch.randn(n)
        weight = prepare(w)
        assert torch.equal(weight.dequantize(), w.float())
        for x_dtype, with_bias in itertools.product(FLOATS, [True, False]):
            x = odd_address(torch.randn(rows, k).to(x_dtype))
            b = bias if with_bias else None
            got = linear(x, weight, b, out_dtype=torch.float32)
            close(got, ref.linear(x, w, b, out_dtype=torch.float32), 2e-6 * k**0.5 + 1e-6)
            close(linear(x, weight, b), ref.linear(x, w, b), 1e-5 + TOLERANCE[x_dtype])


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 17, 64, 131])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_linear_quantized(kind: str, rows: int) -> None:
    for n, k in [(1, 32), (9, 96), (40, 576), (97, 320)]:
        q = quantize(torch.randn(n, k) + 0.1, kind)
        perm = torch.randperm(n)
        q = make_blocks(odd_address(q.planes["blocks"]), kind, (n, k), perm)
        w, bias = q.dequantize(), torch.randn(n)
        weight, exact = prepare(q), prepare(q, exact=True)
        close(weight.dequantize(), w, 1e-3 if kind == "Q4_0" else 1e-6)
        for dtype in FLOATS:
            x = odd_address(torch.randn(rows, k).to(dtype))
            want = ref.linear(x, w, bias, out_dtype=torch.float32)
            close(linear(x, exact, bias, out_dtype=torch.float32), want, 1e-5)
            got = linear(x, weight, bias, out_dtype=torch.float32)
            assert got.isfinite().all()
            if rows and n > 1:
                # x keeps 12 bits of a group's largest with 4-bit weights, 16 with others; tiles
                # round the weights to bfloat16 instead.
                bound = 3e-3 if cpu.level() == "amx" and rows >= 20 else 1e-3
                if kind == "Q8_0" and bound == 1e-3:
                    bound = 1e-4
                assert (got - want).norm() / want.norm() < bound
            assert linear(x, weight, bias).dtype == dtype


# Levels at which several rows of x are rounded to int16, not to parts of int8.
INT16_LEVELS = ("avx2", "avxvnni")


@pytest.mark.skipif(cpu.level() not in INT16_LEVELS, reason="the level has products of int8")
def test_linear_of_several_rows_is_the_product_rounded_to_int16() -> None:
    """Where x is on the grid of 256 elements already, it is exact."""
    for rows in (4, 5, 16):
        x = torch.randint(-32767, 32768, (rows, 512)).float()
        x[:, 7] = 32767
        x[:, 256:] /= 64
        x[:, 300] = -32767 / 64
        for kind in ("Q4_1", "Q8_0"):
            q = quantize(torch.randn(24, 512), kind)
            close(linear(x, prepare(q)), ref.linear(x, q.dequantize()), 1e-5)
        for kind in ("Q5_1", "Q6_K"):
            q = random_weight(kind, 24, 512)
            close(linear(x, prepare(q)), ref.linear(x, q.dequantize()), 1e-5)


def test_linear_int8_mode_is_the_rounded_product() -> None:
    """Where x is on the parts' grid already, the int8 mode is exact."""
    for rows in (1, 3) if cpu.level() in INT16_LEVELS else (1, 5, 16):
        # A group's first half in sixteenths and its second one in wholes of a step, or both the
        # other way round less the 256ths, are what 4-bit weights' parts can say.
        x = torch.randint(-118, 119, (rows, 2, 2, 16)).float()
        x[:, :, 0] = torch.randint(-118 * 16, 118 * 16 + 1, (rows, 2, 16)) / 16
        x[:, :, 0, 0] = 118
        q = quantize(torch.randn(24, 64), "Q4_1")
        got = linear(x.flatten(1), prepare(q))
        close(got, ref.linear(x.flatten(1), q.dequantize()), 1e-5)
        x[:, :, 1] = torch.randint(-118 * 16, 118 * 16 + 1, (rows, 2, 16)) / 16
        x[:, :, 0, 1:] = torch.randint(-117, 118, (rows, 2, 15)) + x[:, :, 1, 1:] % 1 / 16
        x[:, :, 1, 0] = 7
        got = linear(x.flatten(1), prepare(q))
        close(got, ref.linear(x.flatten(1), q.dequantize()), 1e-5)
        for kind in ("Q8_0", "Q5_1", "Q6_K"):
            x = torch.randint(-127 * 256, 127 * 256 + 1, (rows, 256)).float() / 256
            x[:, ::32] = 127
            q = (
                quantize(torch.randn(24, 256), kind)
                if kind == "Q8_0"
                else random_weight(kind, 24, 256)
            )
            close(linear(x, prepare(q)), ref.linear(x, q.dequantize()), 1e-5)


@pytest.mark.parametrize("extreme", [-128, 127])
def test_linear_extreme_bytes(extreme: int) -> None:
    """Every product at its largest: nothing saturates on the way."""
    for n in (8, 16):
        blocks = torch.full((n, 34), extreme, dtype=torch.int8).view(torch.uint8)
        blocks[:, :2] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
        q = make_blocks(blocks.reshape(-1), "Q8_0", (n, 32))
        for x in (torch.full((3, 32), 127.0), torch.full((3, 32), -127.0)):
            close(linear(x, prepare(q)), ref.linear(x, q.dequantize()), 1e-6)
        blocks = torch.full((n, 20), 255, dtype=torch.uint8)
        blocks[:, :4] = torch.ones(2, dtype=torch.float16).view(torch.uint8)
        q = make_blocks(blocks.reshape(-1), "Q4_1", (n, 32))
        for x in (torch.full((3, 32), 127.0), torch.full((3, 32), -127.0)):
            close(linear(x, prepare(q)), ref.linear(x, q.dequantize()), 1e-6)


def test_linear_zero_and_tiny_activations() -> None:
    weight = prepare(quantize(torch.randn(8, 32), "Q8_0"))
    for value in (0.0, 1e-45, 1e-38):
        assert linear(torch.full((2, 32), value), weight).abs().max() < 1e-30


# What a weight takes beyond the file: scales of 6 and 4 bits are bytes.
SURPLUS = {"Q2_K": 16 / 84, "Q3_K": 4 / 110, "Q4_K": 4 / 144, "Q5_K": 4 / 176, "IQ4_XS": 2 / 136}


def random_weight(kind: str, n: int, k: int) -> Planes:
    return make_blocks(random_blocks(kind, n, k), kind, (n, k), torch.randperm(n))


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 45])
def test_every_kind_is_computed_with_as_it_is(kind: str, rows: int) -> None:
    step = BLOCK_FORMATS[kind].block
    for n, k in [(1, step), (19, 3 * step), (97, 2 * step)]:
        q = random_weight(kind, n, k)
        want, x = q.dequantize(), torch.randn(rows, k)
        for level in _core.cpu_levels():
            weight = prepare(q, level=level)
            exact = prepare(q, exact=True, level=level)
            # One rounding of float32: fused or not.
            close(weight.dequantize(), want, 2e-7)
            y = ref.linear(x, want)
            # A single sum may cancel, but not what it is a sum of.
            size = ref.linear(x.abs(), want.abs())
            assert ((linear(x, exact) - y).abs() <= 2e-6 * size).all()
            if n > 1:
                assert (linear(x, weight) - y).norm() < 0.02 * y.norm()
                close(linear(x, exact), y, 1e-5)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_weight_takes_what_the_file_takes(kind: str) -> None:
    q = random_weight(kind, 64, 512)
    found = prepare(q).nbytes / q.nbytes
    assert found == pytest.approx(1 + SURPLUS.get(kind, 0), abs=1e-9)


@pytest.mark.parametrize("level", _core.cpu_levels())
@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_all_ones_do_not_overflow(kind: str, level: str) -> None:
    """Every product at its largest; activations on the int8 grid make the sums exact."""
    step = BLOCK_FORMATS[kind].block
    q = random_weight(kind, 16, step)
    raw = torch.full_like(q.planes["blocks"], 255)
    set_halves(kind, raw, torch.ones(16))
    q = make_blocks(raw.reshape(-1), kind, (16, step))
    weight = prepare(q, level=level)
    for value in (127.0, -127.0):
        x = torch.full((3, step), value)
        close(linear(x, weight), ref.linear(x, q.dequantize()), 1e-6)


def test_prepare_stacked() -> None:
    a, b = torch.randn(5, 64), torch.randn(14, 64)
    x = torch.randn(3, 64)
    q4, q8 = quantize(a, "Q4_1"), quantize(b, "Q8_0")
    for parts in (
        [a, b],
        [q4, quantize(b, "Q4_0")],
        [q4, q8],
        [q8, q8, q4, q8],
        [a, q8],
        [a.bfloat16(), b],
    ):
        weight = prepare(parts, exact=True)
        dense = torch.cat([p if isinstance(p, torch.Tensor) else p.dequantize() for p in parts])
        close(weight.dequantize(), dense.float(), 2e-7)
        close(linear(x, weight), ref.linear(x, dense.float()), 1e-5)
        assert linear(x[:0], weight).shape == (0, len(dense))


@pytest.mark.parametrize("level", _core.cpu_levels())
def test_linear_at_every_level(level: str) -> None:
    x, many = torch.randn(3, 160), torch.randn(45, 160)
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        q = quantize(torch.randn(41, 160), kind)
        weight = prepare(q, level=level)
        # A few rows meet the same integers everywhere; many may be rounded otherwise.
        close(linear(x, weight), linear(x, prepare(q)), 1e-5)
        want = ref.linear(many, q.dequantize())
        assert (linear(many, weight) - want).norm() / want.norm() < 0.01
        exact = prepare(q, exact=True, level=level)
        close(linear(many, exact), want, 1e-5)
    x = many
    for dtype in FLOATS:
        w = torch.randn(41, 160).to(dtype)
        close(linear(x, prepare(w, level=level)), ref.linear(x, w), 1e-5)


@pytest.mark.parametrize("level", _core.cpu_levels())
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_activations_of_8_bits(kind: str, level: str) -> None:
    """Coarser than the default and no coarser than a step of 1/127 of six groups' largest explains."""
    step = BLOCK_FORMATS[kind].block
    q = random_weight(kind, 41, 2 * step)
    w = q.dequantize()
    for rows in (1, 3, 8, 45):
        x = torch.randn(rows, w.shape[1])
        want = ref.linear(x, w)
        coarse = linear(x, prepare(q, activation_bits=8, level=level)) - want
        fine = linear(x, prepare(q, level=level)) - want
        # Rounding to a step of at most 5 standard deviations / 127, uniform within it.
        bound = 5 / 127 / 12**0.5 * w.norm() * rows**0.5
        assert coarse.norm() < 1.5 * bound
        assert fine.norm() <= 1.05 * coarse.norm() or level == "amx"


def test_activations_of_other_bits_are_refused() -> None:
    weight = prepare(quantize(torch.randn(8, 32), "Q8_0"), activation_bits=12)
    with pytest.raises(ValueError, match="8, 16 or 32 bits, not 12"):
        linear(torch.randn(1, 32), weight)


def test_results_do_not_depend_on_the_thread_count() -> None:
    x, q = torch.randn(70, 320), quantize(torch.randn(200, 320), "Q4_1")
    weight, exact = prepare(q), prepare(q, exact=True)
    args, kwargs = attention_case([1500, 700], [1, 40], 4, 2, 64, 16, torch.float32)
    results = []
    try:
        for threads in (1, 2, 3):
            cpu.set_num_threads(threads)
            assert cpu.num_threads() == threads
            results.append(
                (linear(x, weight), linear(x, exact), cpu.paged_attention(*args, **kwargs))
            )
    finally:
        cpu.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_with_what_comes_before_and_after(dtype: torch.dtype) -> None:
    x, w, bias = torch.randn(5, 64).to(dtype), torch.randn(40, 64).to(dtype), torch.randn(40)
    weight, norm = prepare(w), Norm(torch.randn(64), 1e-5, 1.0)
    assert not weight.adds_residual(1)
    for gate, width in (("", 40), ("silu", 20)):
        residual = torch.randn(5, width).to(dtype)
        for options in (
            {"norm": norm},
            {"gate": gate},
            {"residual": residual},
            {"norm": norm, "gate": gate, "residual": residual},
        ):
            if "residual" in options and "gate" not in options and gate:
                continue
            want = ref.linear(x, w, bias, **options)
            if "residual" in options:
                options = {**options, "residual": residual.clone()}
            close(weight.linear(x, bias, **options), want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 31)}, r"x must be .*\(T, 32\)"),
        ({"x": torch.randn(32)}, "x must be"),
        ({"x": torch.randn(32, 2).T}, "not contiguous"),
        ({"x": torch.randn(2, 32).double()}, "float64"),
        ({"x": torch.randn(2, 32, device="meta")}, "meta"),
        ({"bias": torch.randn(7)}, r"bias must be of shape \(8,\)"),
        ({"out_dtype": torch.int32}, "out_dtype"),
        ({"norm": Norm(torch.randn(31), 1e-5)}, "weight must be"),
    ],
)
def test_linear_refuses(change: dict[str, object], message: str) -> None:
    args = {"x": torch.randn(2, 32), "weight": prepare(torch.randn(8, 32)), **change}
    with pytest.raises(ValueError, match=message):
        linear(**args)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- embedding


def test_rows() -> None:
    ids = torch.tensor([3, 0, 10, 3], dtype=torch.int32)
    w = torch.randn(11, 64)
    for dtype in FLOATS:
        got = prepare(w.to(dtype)).rows(ids, 3.0)
        want = ref.embedding(ids, w.to(dtype), scale=3.0)
        close(got, want, 0 if dtype == torch.float32 else 1e-2)
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        q = quantize(w, kind)
        for dtype in FLOATS:
            got = prepare(q).rows(ids, out_dtype=dtype)
            want = ref.embedding(ids, q.dequantize(), out_dtype=dtype)
            close(got, want, 1e-3 + TOLERANCE[dtype])
    weight = prepare(w)
    assert weight.rows(ids[:0]).shape == (0, 64)
    for bad in (-1, 11):
        with pytest.raises(ValueError, match="outside the vocabulary of 11"):
            weight.rows(torch.tensor([bad], dtype=torch.int32))
    with pytest.raises(ValueError, match="int32"):
        weight.rows(ids.long())


# ------------------------------------------------------------------------------- norms, activations


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (1, 1), (3, 40), (5, 576), (70, 1001)])
def test_norms(dtype: torch.dtype, rows: int, cols: int) -> None:
    x = odd_address(torch.randn(rows, cols).to(dtype) + 0.5)
    residual = torch.randn(rows, cols).to(dtype)
    for w_dtype in (torch.float32, dtype):
        w, b = torch.randn(cols).to(w_dtype), torch.randn(cols).to(w_dtype)
        for offset in (0.0, 1.0):
            close(
                cpu.rms_norm(x, w, 1e-5, weight_offset=offset),
                ref.rms_norm(x, w, 1e-5, weight_offset=offset),
            )
        for bias in (b, None):
            close(cpu.layer_norm(x, w, bias, 1e-3), ref.layer_norm(x, w, bias, 1e-3), 2e-2)
        for op, args in [("rms_norm", (w, 1e-5)), ("layer_norm", (w, b, 1e-3))]:
            got, new = getattr(cpu, op)(x, *args, residual=residual.clone())
            want, want_new = getattr(ref, op)(x, *args, residual=residual.clone())
            close(got, want, None if op == "rms_norm" else 2e-2)
            assert torch.equal(new, want_new)


def test_norms_refuse() -> None:
    x, w = torch.randn(3, 8), torch.randn(8)
    for bad in (
        lambda: cpu.rms_norm(x.T, torch.randn(3), 1e-5),
        lambda: cpu.rms_norm(x, w[:7], 1e-5),
        lambda: cpu.rms_norm(x, w, 1e-5, residual=x[:2]),
        lambda: cpu.rms_norm(x, w, 1e-5, residual=x.bfloat16()),
        lambda: cpu.rms_norm(x, w, 1e-5, residual=x),
        lambda: cpu.layer_norm(x, w, w[:4], 1e-5),
    ):
        with pytest.raises(ValueError, match=r"must|residual"):
            bad()


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations(dtype: torch.dtype) -> None:
    for rows, cols in [(0, 4), (1, 1), (3, 20), (2, 20000), (40, 1536)]:
        x = odd_address((torch.randn(rows, 2 * cols) * 4).to(dtype))
        for kind in ("silu", "gelu", "gelu_tanh", "swiglu_clamped"):
            close(cpu.gated_activation(x, kind), ref.gated_activation(x, kind))
        for kind in ("silu", "gelu", "gelu_tanh", "gelu_new", "relu", "relu2"):
            close(cpu.activation(x, kind), ref.activation(x, kind))
    extremes = torch.tensor([[0.0, -0.0, 1e-30, -90, 90, -1e30, 1e30, 3e38]])
    extremes = extremes.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    for kind in ("silu", "gelu", "gelu_tanh"):
        got = cpu.activation(extremes, kind)
        torch.testing.assert_close(got, ref.activation(extremes, kind), rtol=1e-2, atol=1e-5)
    for bad in (
        lambda: cpu.activation(x, "swish"),
        lambda: cpu.gated_activation(x, "relu"),
        lambda: cpu.gated_activation(x[:, :3].contiguous(), "silu"),
        lambda: cpu.activation(x.T, "silu"),
    ):
        with pytest.raises(ValueError, match=r"unknown|must"):
            bad()


# -------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rot"),
    [
        (9, 3, 64, 64),
        (4, 4, 40, 40),
        (8, 1, 80, 32),
        (6, 2, 96, 96),
        (4, 2, 128, 64),
        (2, 1, 256, 256),
        (1, 1, 6, 6),
    ],
)
def test_rope(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rot: int) -> None:
    angles = torch.outer(torch.arange(50.0), 1 / 1000 ** (torch.arange(0, rot, 2) / rot))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    for tokens, block_size in [(0, 1), (1, 3), (5, 1), (70, 16)]:
        num_blocks = 100 // block_size + 1
        qkv = odd_address(torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype))
        positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
        slots = torch.randperm(100, dtype=torch.int32)[:tokens]
        slots[::4] = -1
        q_norm, k_norm = torch.randn(dim), torch.randn(dim)
        for cache_dtype, norms, interleaved in [
            (torch.float32, False, False),
            (torch.bfloat16, True, False),
            (torch.float16, False, True),
        ]:
            both = torch.full((num_blocks, 2, kv_heads, block_size, dim), 7.0, dtype=cache_dtype)
            other = both.clone()
            options = {
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": dim,
                "q_norm": q_norm if norms else None,
                "k_norm": k_norm if norms else None,
                "eps": 1e-5,
                "weight_offset": 1.0 if norms else 0.0,
                "interleaved": interleaved,
            }
            # A cache whose blocks are apart: keys and values of a block side by side.
            args = (qkv, positions, cos_sin, slots)
            got = cpu.qk_norm_rope_store_kv(*args, both[:, 0], both[:, 1], **options)
            want = ref.qk_norm_rope_store_kv(*args, other[:, 0], other[:, 1], **options)
            close(got, want)
            close(both, other, max(TOLERANCE[cache_dtype], 1e-5))
            untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
            untouched[slots[slots >= 0].long()] = False
            rows = both.permute(0, 3, 1, 2, 4).reshape(num_blocks * block_size, -1)
            assert (rows[untouched] == 7).all()


def test_rope_refuses() -> None:
    cache = torch.zeros(2, 1, 4, 8)
    qkv, cos_sin = torch.randn(2, 24), torch.randn(5, 8)
    at = torch.tensor([0, 1], dtype=torch.int32)
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}

    def call(**change: object) -> None:
        args = {
            "qkv": qkv,
            "positions": at,
            "cos_sin": cos_sin,
            "slot_mapping": at,
            "k_cache": cache,
            "v_cache": cache.clone(),
            **sizes,
            **change,
        }
        cpu.qk_norm_rope_store_kv(**args)  # type: ignore[arg-type]

    call()
    for change, message in [
        ({"positions": at + 4}, "position 5 is outside the table of 5"),
        ({"positions": at - 1}, "position -1"),
        ({"slot_mapping": at + 7}, "slot 8 is outside the cache of 8"),
        ({"positions": at.long()}, "int32"),
        ({"positions": at[:1]}, "positions must be"),
        ({"num_heads": 2}, "qkv must be"),
        ({"v_cache": torch.zeros(2, 1, 4, 7)}, "v_cache must be like"),
        ({"k_cache": cache.transpose(1, 2)}, "v_cache must be like|k_cache must be"),
        ({"cos_sin": cos_sin.double()}, "cos_sin must be"),
        ({"cos_sin": torch.randn(5, 10)}, "not supported"),
        ({"q_norm": torch.randn(7)}, "q_norm must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**change)


# --------------------------------------------------------------------------------------- attention


def attention_case(
    seq_lens: list[int],
    query_lens: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    **options: object,
) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    """Arguments for requests in shuffled blocks; unused cache entries are NaN."""
    need = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(need) + 3
    order = torch.randperm(num_blocks).tolist()
    caches = torch.full((2, num_blocks, kv_heads, block_size, dim), float("nan"))
    requests = len(seq_lens)
    slots = torch.randperm(requests + 2, dtype=torch.int32)[:requests]
    table = torch.full((requests + 2, max(need, default=0) + 1), -5, dtype=torch.int32)
    for r, (length, blocks) in enumerate(zip(seq_lens, need, strict=True)):
        for i in range(blocks):
            table[slots[r], i] = order.pop()
            used = min(block_size, length - i * block_size)
            caches[:, table[slots[r], i], :, :used] = torch.randn(2, kv_heads, used, dim)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
    caches = caches.to(cache_dtype or dtype)
    q = odd_address(torch.randn(int(starts[-1]), heads, dim).to(dtype))
    args = (
        q,
        caches[0],
        caches[1],
        table,
        slots,
        torch.tensor(seq_lens, dtype=torch.int32),
        starts,
    )
    hints = {
        "scale": dim**-0.5,
        "num_decodes": sum(n == 1 for n in query_lens),
        "max_query_len": max(query_lens, default=0),
        "max_seq_len": max(seq_lens, default=0),
    }
    return args, {**hints, **options}


def check_attention(*case: object, **options: object) -> None:
    args, kwargs = attention_case(*case, **options)  # type: ignore[arg-type]
    # Queries and probabilities that meet bfloat16 keys and values are rounded to it too, where
    # the processor multiplies such pairs.
    q, keys = args[:2]
    tol = TOLERANCE[torch.bfloat16 if keys.dtype == torch.bfloat16 else q.dtype]
    close(cpu.paged_attention(*args, **kwargs), ref.paged_attention(*args, **kwargs), tol)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [40, 64, 80, 96, 128, 256])
def test_attention_shapes(dim: int, dtype: torch.dtype) -> None:
    for heads, kv_heads, block_size in [(9, 3, 16), (4, 4, 3), (8, 1, 1), (10, 2, 16)]:
        check_attention(
            [1, 70, 5, 130, 67], [1, 1, 5, 64, 3], heads, kv_heads, dim, block_size, dtype
        )


@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_attention_mixed_cache(cache_dtype: torch.dtype) -> None:
    check_attention([33, 200], [1, 17], 6, 2, 64, 16, torch.float32, cache_dtype)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 100},
        {"softcap": 0.5},
        {"softcap": 30.0, "sliding_window": 65},
        {"causal": False},
        {"causal": False, "sliding_window": 20},
        {"scale": 1.0},
        {"sinks": torch.tensor([-3.0, 0.0, 1.0, 5.0, 300.0, -300.0])},
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.01, 0.0]), "sliding_window": 70},
    ],
)
def test_attention_options(options: dict[str, object], cache_dtype: torch.dtype) -> None:
    case = [150, 131, 64, 20], [1, 131, 40, 2], 6, 2, 64, 16, torch.float32, cache_dtype
    check_attention(*case, **options)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_attention_long_and_odd(cache_dtype: torch.dtype) -> None:
    def check(*case: object, **options: object) -> None:
        check_attention(*case, torch.float32, cache_dtype, **options)

    check([2000, 513, 512, 1030], [1, 1, 1, 1], 6, 2, 64, 16)
    check([2000, 513, 512, 1030], [1, 1, 1, 1], 26, 2, 96, 16)
    sinks, slopes = torch.linspace(-2, 4, 6), torch.linspace(0.001, 0.1, 6)
    check([2000, 1030], [1, 1], 6, 2, 64, 16, sinks=sinks, slopes=slopes)
    check([2000, 1030], [1, 1], 6, 1, 576, 16)
    check([1300], [1], 4, 2, 40, 3, sliding_window=1100)
    check([700], [300], 32, 8, 64, 16)
    check([90], [90], 64, 1, 16, 8)
    check([9, 70], [1, 9], 2, 1, 7, 4)


def test_attention_nothing_to_do() -> None:
    check_attention([], [], 2, 1, 16, 4, torch.float32)
    # A padded request: no rows, and a slot that is only a spare row of the table.
    args, kwargs = attention_case([5], [5], 2, 1, 16, 4, torch.float32)
    q, k, v, table, slots, seq_lens, starts = args
    pad = torch.zeros(1, dtype=torch.int32)
    args = (
        torch.cat([q, q[:2]]),
        k,
        v,
        table,
        torch.cat([slots, pad + table.shape[0] - 1]),
        torch.cat([seq_lens, pad]),
        torch.cat([starts, starts[-1:]]),
    )
    close(cpu.paged_attention(*args, **kwargs)[:5], ref.paged_attention(*args, **kwargs)[:5])


def test_attention_does_not_read_what_the_window_gave_back() -> None:
    args, kwargs = attention_case([64, 60], [1, 5], 2, 1, 16, 4, torch.float32, sliding_window=9)
    want = ref.paged_attention(*args, **kwargs)
    _, k, v, table, slots, *_ = args
    for r, first in enumerate([(64 - 9) // 4, (56 - 9) // 4]):
        for i in range(first):
            k[table[slots[r], i]] = v[table[slots[r], i]] = float("nan")
            table[slots[r], i] = -1
    close(cpu.paged_attention(*args, **kwargs), want)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (3, lambda t: t + 1000, "block .* of"),
        (3, lambda t: t.long(), "int32"),
        (3, lambda t: t[:, :1].contiguous(), "outside the block table"),
        (4, lambda t: t + 50, "outside the block table"),
        (4, lambda t: -t - 1, "outside the block table"),
        (5, lambda t: t + 10_000, "outside the block table"),
        (5, lambda t: t * 0 + 2, "query rows"),
        (6, lambda t: t + 1, "query rows"),
        (6, lambda t: t[:-1], "query_start_loc must be"),
        (0, lambda t: t[..., :8].contiguous(), "q must be"),
        (0, lambda t: t.transpose(0, 1), "q must be"),
        (1, lambda t: t[:, :, :, :8], "must be"),
        (2, lambda t: t.bfloat16(), "v_cache must be like"),
    ],
)
def test_attention_refuses(index: int, value: object, message: str) -> None:
    args, kwargs = attention_case([30, 9], [1, 5], 4, 2, 16, 4, torch.float32)
    changed = list(args)
    changed[index] = value(args[index])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        cpu.paged_attention(*changed, **kwargs)


@pytest.mark.parametrize("name", ["sinks", "slopes"])
def test_attention_refuses_other_values_of_heads(name: str) -> None:
    args, kwargs = attention_case([30], [1], 4, 2, 16, 4, torch.float32)
    for values in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            cpu.paged_attention(*args, **kwargs, **{name: values})


# -------------------------------------------------------------------------------- moe and sampling


def test_moe() -> None:
    t, d, f, e = 13, 64, 32, 5
    x, logits = torch.randn(t, d), torch.randn(t, e)
    w13, w2 = torch.randn(e, 2 * f, d), torch.randn(e, d, f)
    experts = cpu.prepare_experts([[w[:f], w[f:]] for w in w13], list(w2))
    assert experts.num_elements == w13.numel() + w2.numel()
    for renormalize in (False, True):
        want = ref.moe(x, logits, w13, w2, Routing(2, renormalize))
        close(experts.mix(x, logits, Routing(2, renormalize)), want)
        some = cpu.prepare_experts([[w[:f], w[f:]] for w in w13[1:]], list(w2[1:]))
        want = ref.moe(x, logits, w13[1:], w2[1:], Routing(2, renormalize), first=1)
        close(some.mix(x, logits, Routing(2, renormalize), first=1), want)
    biases = ExpertBiases(torch.randn(e, 2 * f), torch.randn(e, d))
    experts = cpu.prepare_experts([[w[:f], w[f:]] for w in w13], list(w2), biases=biases)
    want = ref.moe(x, logits, w13, w2, Routing(2), biases=biases, kind="swiglu_clamped")
    close(experts.mix(x, logits, Routing(2), kind="swiglu_clamped"), want)
    ungated = w13[:, :f].contiguous()
    experts = cpu.prepare_experts([[w] for w in ungated], list(w2))
    want = ref.moe(x, logits, ungated, w2, Routing(2), kind="relu2")
    close(experts.mix(x, logits, Routing(2), kind="relu2"), want)
    with pytest.raises(ValueError, match="48 rows does not fit one of 32 columns"):
        cpu.prepare_experts([[w[:48]] for w in w13], list(w2))


def test_argmax_and_logprobs() -> None:
    for rows, vocab in [(0, 5), (1, 1), (3, 63), (2, 49152), (9, 1000)]:
        logits = torch.randn(rows, vocab) * 5
        logits[:, vocab // 2] = logits.amax(-1) if rows else 0
        assert torch.equal(cpu.argmax(logits), ref.argmax(logits))
        ids = torch.randint(0, vocab, (rows, 4), dtype=torch.int32)
        got, want = cpu.selected_logprobs(logits, ids), ref.selected_logprobs(logits, ids)
        close(got[0], want[0])
        assert torch.equal(got[1], want[1])
    masked = torch.full((1, 40), float("-inf"))
    masked[0, 17] = -3.0
    assert cpu.argmax(masked).tolist() == [17]
    assert cpu.selected_logprobs(masked, torch.tensor([[17]], dtype=torch.int32))[0].item() == 0
    with pytest.raises(ValueError, match="outside the vocabulary"):
        cpu.selected_logprobs(masked, torch.tensor([[40]], dtype=torch.int32))
    with pytest.raises(ValueError, match="logits must be"):
        cpu.argmax(masked.bfloat16())


def test_masks_of_logits() -> None:
    for vocab in (1, 31, 32, 33, 70, 1000):
        logits = torch.randn(6, vocab)
        logits[3] = float("-inf")
        rows = torch.tensor([5, -1, 0, 3, 2], dtype=torch.int32)
        masks = torch.randint(-(2**31), 2**31, (5, -(-vocab // 32))).int()
        masks[torch.rand(masks.shape) < 0.3] = 0
        masks[torch.rand(masks.shape) < 0.3] = -1
        masks[4] = 0
        want = ref.mask_logits(logits, rows, masks)
        found = logits.clone()
        has_any = cpu.mask_logits_(found, rows, masks)
        assert torch.equal(found, want)
        kept = (want > float("-inf")).any(-1)
        assert has_any.tolist() == [bool(row < 0 or kept[row]) for row in rows]
        assert not has_any[4]
        assert not has_any[3]
    for rows_wrong in ([6], [1, 1]):
        rows = torch.tensor(rows_wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match="row"):
            cpu.mask_logits_(found, rows, masks[: len(rows)])
    with pytest.raises(ValueError, match="in the place of"):
        cpu.mask_logits_(found, rows, masks[:, 1:].contiguous()[:2])


# ------------------------------------------------------------------------------------------ levels


@pytest.mark.slow
@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_whole_file_at_level(level: str) -> None:
    run = run_at_level(__file__, level)
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_level_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from octavo.kernels.cpu import ops; ops.level()"],
        env={**os.environ, "OCTAVO_CPU_LEVEL": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "'sse9'" in run.stderr or '"sse9"' in run.stderr
    assert "scalar" in run.stderr
