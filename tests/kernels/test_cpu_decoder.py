"""All layers in one call against the same ops called one by one: equal to the last bit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.decoder import CpuDecoder
from octavo.kernels.decoder import DecoderSpec, LayerSpec
from octavo.kernels.kv_cache import LARGEST, make_cache
from octavo.kernels.reference import DenseWeight
from octavo.kernels.weights import Weight, quantize

D, F, HEADS, KV_HEADS, DIM, BLOCK = 96, 160, 6, 2, 32, 8


def weight(n: int, k: int, kind: str | None) -> Weight:
    w = torch.randn(n, k) * k**-0.5
    return cpu.prepare([w if kind is None else quantize(w, kind)])


def make_spec(
    kind: str | None, *, extras: bool, num_layers: int = 3, kv_dtype: torch.dtype = torch.float32
) -> DecoderSpec:
    """Random layers; ``extras``: biases, head norms, a window and a softcap."""

    def vector(n: int) -> Tensor:
        return torch.rand(n) + 0.5

    def projection(n: int, k: int) -> tuple[Weight, Tensor | None]:
        return weight(n, k, kind), torch.randn(n) if extras else None

    def cache() -> Tensor:
        made = make_cache((40, KV_HEADS, BLOCK, DIM), kv_dtype, torch.device("cpu"))
        made.untyped_storage().fill_(0xFF)  # NaN, of floats
        return made

    layers = [
        LayerSpec(
            input_norm=vector(D),
            post_norm=vector(D),
            qkv=projection((HEADS + 2 * KV_HEADS) * DIM, D),
            o=projection(D, HEADS * DIM),
            gate_up=projection(2 * F, D),
            down=projection(D, F),
            q_norm=vector(DIM) if extras else None,
            k_norm=vector(DIM) if extras else None,
            # Static scales of a cache of bytes, in one layer.
            kv_scales=torch.rand(2, KV_HEADS) * 0.1 if extras and i == 1 else None,
            k_cache=cache(),
            v_cache=cache(),
            sliding_window=5 if extras and i == 1 else 0,
        )
        for i in range(num_layers)
    ]
    angles = torch.rand(400, DIM // 2) * 6
    return DecoderSpec(
        layers=layers,
        final_norm=vector(D),
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1),
        num_heads=HEADS,
        eps=1e-5,
        scale=DIM**-0.5,
        softcap=20.0 if extras else 0.0,
        act="silu",
    )


def copy(cache: Tensor) -> Tensor:
    """The same cache in memory of its own, scales and all."""
    made = make_cache((40, KV_HEADS, BLOCK, DIM), cache.dtype, cache.device)
    made.untyped_storage().copy_(cache.untyped_storage())
    return made


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_step(past: list[int], new: list[int]) -> SimpleNamespace:
    """Requests with so many tokens in the cache and so many in this step, in shuffled blocks."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(past) + 1, 20), -7, dtype=torch.int32)
    positions, slot_mapping = [], []
    for r, (before, now) in enumerate(zip(past, new, strict=True)):
        blocks = [order.pop() for _ in range(-(-(before + now) // BLOCK))]
        table[r, : len(blocks)] = ints(blocks)
        for p in range(before, before + now):
            positions.append(p)
            slot_mapping.append(blocks[p // BLOCK] * BLOCK + p % BLOCK)
    return SimpleNamespace(
        positions=ints(positions),
        slot_mapping=ints(slot_mapping),
        slots=ints(list(range(len(past)))),
        seq_lens=ints([a + b for a, b in zip(past, new, strict=True)]),
        query_start_loc=ints([0, *itertools.accumulate(new)]),
        block_table=table,
        ends_only=False,
    )


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return weight.linear(x, bias)


def one_by_one(spec: DecoderSpec, x: Tensor, ctx: SimpleNamespace) -> Tensor:
    residual: Tensor | None = None
    for layer in spec.layers:
        if residual is None:
            residual, x = x, cpu.rms_norm(x, layer.input_norm, spec.eps)
        else:
            x, residual = cpu.rms_norm(x, layer.input_norm, spec.eps, residual=residual)
        q = cpu.qk_norm_rope_store_kv(
            linear(x, *layer.qkv),
            ctx.positions,
            spec.cos_sin,
            ctx.slot_mapping,
            layer.k_cache,
            layer.v_cache,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=spec.eps,
            kv_scales=layer.kv_scales,
        )
        attended = cpu.paged_attention(
            q,
            layer.k_cache,
            layer.v_cache,
            ctx.block_table,
            ctx.slots,
            ctx.seq_lens,
            ctx.query_start_loc,
            scale=spec.scale,
            num_decodes=0,
            max_query_len=1,
            max_seq_len=1,
            sliding_window=layer.sliding_window,
            softcap=spec.softcap,
        )
        x = linear(attended, *layer.o)
        x, residual = cpu.rms_norm(x, layer.post_norm, spec.eps, residual=residual)
        x = linear(cpu.gated_activation(linear(x, *layer.gate_up), spec.act), *layer.down)
    return cpu.rms_norm(x, spec.final_norm, spec.eps, residual=residual)[0]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("kind", [None, "Q4_1", "Q8_0"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, *LARGEST])
def test_equals_the_ops_one_by_one(kind: str | None, extras: bool, kv_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = make_spec(kind, extras=extras, kv_dtype=kv_dtype)
    twin = replace(
        spec,
        layers=[
            replace(layer, k_cache=copy(layer.k_cache), v_cache=copy(layer.v_cache))
            for layer in spec.layers
        ],
    )
    decoder = cpu.make_decoder(spec)
    assert isinstance(decoder, CpuDecoder)
    # A prompt longer than a block of rows beside a short one; chunks behind it; decodes.
    steps = [([0, 0], [140, 3]), ([140, 3], [1, 9]), ([141, 12], [1, 1])]
    for past, new in steps:
        ctx = make_step(past, new)
        hidden = torch.randn(sum(new), D)
        want = one_by_one(twin, hidden.clone(), ctx)
        got = decoder(hidden, ctx)
        assert want.isfinite().all()
        assert torch.equal(got, want)
    for layer, other in zip(spec.layers, twin.layers, strict=True):
        for name in ("k_cache", "v_cache"):
            found, wanted = getattr(layer, name), getattr(other, name)
            assert bytes(found.untyped_storage()) == bytes(wanted.untyped_storage())


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_last_rows_alone_are_those_of_all(num_layers: int, kv_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = make_spec("Q4_1", extras=True, kv_dtype=kv_dtype, num_layers=num_layers)
    twin = replace(
        spec,
        layers=[
            replace(layer, k_cache=copy(layer.k_cache), v_cache=copy(layer.v_cache))
            for layer in spec.layers
        ],
    )
    all_rows, last_rows = cpu.make_decoder(spec), cpu.make_decoder(twin)
    assert all_rows is not None
    assert last_rows is not None
    # The request between the others has nothing to say.
    for past, new in [
        ([0, 0, 0], [140, 0, 3]),
        ([140, 0, 3], [1, 0, 9]),
        ([141, 0, 12], [1, 0, 1]),
    ]:
        ctx = make_step(past, new)
        hidden = torch.randn(sum(new), D)
        want = all_rows(hidden.clone(), ctx)
        ctx.ends_only = True
        got = last_rows(hidden, ctx)
        ends = [end - 1 for end, n in zip(itertools.accumulate(new), new, strict=True) if n]
        # A lone query's keys are summed up in another order.
        torch.testing.assert_close(got[ends], want[ends], atol=2e-2, rtol=2e-2)
        assert (got[ends] - want[ends]).abs().mean() < 1e-3
    for layer, other in zip(spec.layers, twin.layers, strict=True):
        for name in ("k_cache", "v_cache"):
            found, wanted = getattr(layer, name), getattr(other, name)
            assert bytes(found.untyped_storage()) == bytes(wanted.untyped_storage())


def test_no_tokens() -> None:
    decoder = cpu.make_decoder(make_spec(None, extras=False, num_layers=1))
    assert decoder is not None
    ctx = make_step([], [])
    assert decoder(torch.empty(0, D), ctx).shape == (0, D)
    ctx.ends_only = True
    assert decoder(torch.empty(0, D), ctx).shape == (0, D)


def test_bad_steps_are_refused() -> None:
    decoder = cpu.make_decoder(make_spec("Q4_1", extras=False, num_layers=1))
    assert decoder is not None
    good = make_step([0], [4])
    for name, value, message in [
        ("positions", ints([0, 1, 2, 400]), "position 400"),
        ("slot_mapping", ints([0, 1, 2, 320]), "slot 320"),
        ("slots", ints([9]), "slot 9"),
        ("seq_lens", ints([2]), "query rows"),
        ("query_start_loc", ints([0, 5]), "query rows"),
        ("positions", ints([0, 1]), "positions"),
    ]:
        for ends_only in (False, True):
            bad = SimpleNamespace(**{**vars(good), name: value, "ends_only": ends_only})
            with pytest.raises(ValueError, match=message):
                decoder(torch.randn(4, D), bad)
    for hidden in (
        torch.randn(4, D - 1),
        torch.randn(4, D).bfloat16(),
        torch.randn(4, 2 * D)[:, ::2],
    ):
        with pytest.raises(ValueError, match="hidden"):
            decoder(hidden, good)


def test_layers_that_do_not_fit_are_refused() -> None:
    spec = make_spec(None, extras=False, num_layers=1)
    layer = spec.layers[0]
    for change, message in [
        ({"o": (weight(D, D, None), None)}, "o is 96 x 96"),
        ({"gate_up": (weight(2 * F - 2, D, None), None)}, "gate_up is 318 x 96"),
        ({"post_norm": torch.ones(D - 1)}, "post_norm"),
        ({"v_cache": layer.v_cache[:, :1]}, "v_cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.make_decoder(replace(spec, layers=[replace(layer, **change)]))
    foreign = replace(layer, down=(DenseWeight(torch.randn(D, F)), None))
    with pytest.raises(ValueError, match="another device"):
        cpu.make_decoder(replace(spec, layers=[foreign]))
