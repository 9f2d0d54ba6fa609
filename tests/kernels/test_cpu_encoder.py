"""All layers of an encoder in one call against the same ops of reference.py.

The same file runs at the other levels in child processes, as test_cpu.py does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from levels import OTHER_LEVELS, run_at_level
from octavo import _core
from octavo.kernels import reference as ref
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.encoder import CpuEncoder
from octavo.kernels.encoder import EncoderLayerSpec, EncoderSpec

# (hidden_size, intermediate_size, num_heads): odd heads, K of no whole group or block, and of
# several blocks; columns of no whole panel.
SHAPES = [(120, 96, 3), (33, 70, 1), (45, 131, 3), (400, 800, 5), (384, 1536, 12)]
LENGTHS = [[1], [5, 1, 40, 0, 16, 17, 33], [130, 7], [300], [64] * 9, []]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    cpu.set_num_threads(0)


def make_spec(size: int, inner: int, heads: int, *, bias: bool = True) -> EncoderSpec:
    def dense(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        return torch.randn(n, k) * k**-0.5, torch.randn(n) * 0.1 if bias else None

    def norm() -> tuple[Tensor, Tensor | None]:
        return torch.rand(size) + 0.5, torch.randn(size) * 0.1 if bias else None

    layers = [
        EncoderLayerSpec(
            qkv=dense(3 * size, size),
            o=dense(size, size),
            o_norm=norm(),
            up=dense(inner, size),
            down=dense(size, inner),
            mlp_norm=norm(),
        )
        for _ in range(2)
    ]
    scale = (size // heads) ** -0.5
    return EncoderSpec(layers=layers, num_heads=heads, eps=1e-5, scale=scale, act="gelu")


def packed(spec: EncoderSpec, *, rounded: bool) -> CpuEncoder:
    layers = [
        replace(
            layer,
            **{
                name: (cpu.prepare([weight]), bias)
                for name in ("qkv", "o", "up", "down")
                for weight, bias in [getattr(layer, name)]
            },
        )
        for layer in spec.layers
    ]
    encoder = cpu.make_encoder(replace(spec, layers=layers, rounded=rounded))
    assert isinstance(encoder, CpuEncoder)
    return encoder


def one_by_one(spec: EncoderSpec, x: Tensor, lengths: list[int]) -> Tensor:
    def norm(x: Tensor, residual: Tensor, part: tuple[Tensor, Tensor | None]) -> Tensor:
        y = ref.layer_norm(x + residual, *part, spec.eps)
        assert isinstance(y, Tensor)
        return y

    for layer in spec.layers:
        attended = []
        for text in ref.linear(x, *layer.qkv).split(lengths):
            heads = text.view(len(text), 3, spec.num_heads, x.shape[1] // spec.num_heads)
            q, k, v = heads.permute(1, 2, 0, 3)
            probs = (q @ k.transpose(1, 2) * spec.scale).softmax(-1)
            attended.append((probs @ v).transpose(0, 1).flatten(1))
        x = norm(ref.linear(torch.cat(attended), *layer.o), x, layer.o_norm)
        inner = ref.activation(ref.linear(x, *layer.up), spec.act)
        x = norm(ref.linear(inner, *layer.down), x, layer.mlp_norm)
    return x


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_the_reference(
    shape: tuple[int, int, int], lengths: list[int], threads: int
) -> None:
    cpu.set_num_threads(threads)
    spec = make_spec(*shape, bias=shape[0] != 33)
    x = torch.randn(sum(lengths), shape[0])
    want = one_by_one(spec, x, lengths) if lengths else x
    exact = packed(spec, rounded=False)(x.clone(), starts_of(lengths))
    torch.testing.assert_close(exact, want, atol=3e-5, rtol=1e-5)
    rounded = packed(spec, rounded=True)(x.clone(), starts_of(lengths))
    if lengths:
        # 14 bits a factor; bfloat16's 8 would be some 3e-3.
        assert float((rounded - want).norm() / want.norm()) < 5e-4


@pytest.mark.parametrize("rounded", [False, True])
def test_a_text_does_not_depend_on_its_company_nor_on_threads(rounded: bool) -> None:
    encoder = packed(make_spec(120, 200, 3), rounded=rounded)
    text = torch.randn(23, 120)
    results = []
    for threads, before, after in [(1, [], []), (1, [7, 200], [9]), (3, [90, 31], [64] * 6)]:
        cpu.set_num_threads(threads)
        lengths = [*before, 23, *after]
        x = torch.randn(sum(lengths), 120)
        first = sum(before)
        x[first : first + 23] = text
        results.append(encoder(x, starts_of(lengths))[first : first + 23].clone())
    for other in results[1:]:
        # Exact products round as many rows or few: the tiles' order of sums is the same.
        torch.testing.assert_close(other, results[0], atol=0, rtol=0)


def test_rounding_takes_half_the_bytes_and_only_where_it_is_faster() -> None:
    spec = make_spec(384, 1536, 12)
    exact, rounded = packed(spec, rounded=False), packed(spec, rounded=True)
    assert not exact.rounded
    assert (
        rounded.rounded == _core.cpu_rounds_fast() == (cpu.level() in ("avx2", "avxvnni", "avx512"))
    )
    if rounded.rounded:
        assert 0.5 * exact.nbytes < rounded.nbytes < 0.52 * exact.nbytes


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_not_a_number_shows_and_stays_in_its_text(rounded: bool) -> None:
    encoder = packed(make_spec(120, 96, 3), rounded=rounded)
    for value in (float("nan"), float("inf")):
        x = torch.randn(30, 120)
        x[3, 7] = value
        y = encoder(x, starts_of([10, 20]))
        assert y[3].isnan().all()
        assert y[10:].isfinite().all()


def test_extreme_values() -> None:
    """Factors at the largest rounded value in every place, of either sign, tiny ones and zeros."""
    size = 384
    spec = make_spec(size, size, 12)
    layer = spec.layers[0]
    for weight in (1.0, -1.0, 1e-42, 0.0):
        up = torch.full((size, size), weight)
        one = replace(spec, layers=[replace(layer, up=(up, None))], act="relu")
        # A norm's weight of zero and bias of 2: every factor of the product is its block's largest.
        flat = (torch.zeros(size), torch.full((size,), 2.0))
        one = replace(one, layers=[replace(one.layers[0], o_norm=flat)])
        x = torch.randn(40, size)
        want = one_by_one(one, x, [40])
        got = packed(one, rounded=True)(x.clone(), starts_of([40]))
        assert float((got - want).norm() / want.norm()) < 5e-4


def test_bad_calls_are_refused() -> None:
    spec = make_spec(120, 96, 3)
    encoder = packed(spec, rounded=False)
    x = torch.randn(6, 120)
    for starts in ([0, 5], [1, 6], [0, 4, 3, 6], [-1, 6], [0, 7], []):
        with pytest.raises(ValueError, match="rows 0 to 6"):
            encoder(x, torch.tensor(starts, dtype=torch.int32))
    for bad in (x[:, :119], x.bfloat16(), x.double(), torch.randn(6, 240)[:, ::2], x[0]):
        with pytest.raises(ValueError, match="hidden"):
            encoder(bad, starts_of([6]))
    with pytest.raises(ValueError, match="query_start_loc"):
        encoder(x, torch.tensor([0, 6]))


def test_layers_that_do_not_fit_are_refused() -> None:
    spec = make_spec(120, 96, 3)
    layer = spec.layers[0]

    def dense(n: int, k: int) -> tuple[Tensor, Tensor | None]:
        return torch.randn(n, k), None

    for change, message in [
        ({"qkv": dense(359, 120)}, "qkv is 359 x 120"),
        ({"o": dense(120, 96)}, "o is 120 x 96"),
        ({"down": dense(120, 95)}, "down is 120 x 95"),
        ({"mlp_norm": (torch.ones(119), None)}, "mlp_norm"),
        ({"up": (torch.randn(96, 120), torch.ones(95))}, "bias"),
    ]:
        for rounded in (False, True):
            with pytest.raises(ValueError, match=message):
                packed(replace(spec, layers=[replace(layer, **change)]), rounded=rounded)
    with pytest.raises(ValueError, match="7 heads"):
        packed(replace(spec, num_heads=7), rounded=False)
    with pytest.raises(ValueError, match="swish"):
        packed(replace(spec, act="swish"), rounded=False)
    with pytest.raises(ValueError, match="another device"):
        cpu.make_encoder(spec)


@pytest.mark.slow
@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_whole_file_at_level(level: str) -> None:
    run = run_at_level(__file__, level)
    assert run.returncode == 0, run.stdout[-3000:]
