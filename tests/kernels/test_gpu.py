"""The Triton kernels against the reference: odd shapes everywhere, real ones on a GPU.

Without a GPU they run in Triton's interpreter, which knows no bfloat16 dots: float16 stands in.
Every buffer the wrappers allocate is filled with NaN first.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference  # noqa: E402
from octavo.kernels import slots as slots_module  # noqa: E402
from octavo.kernels.routing import Routing  # noqa: E402
from octavo.kernels.weights import ExpertBiases, Norm  # noqa: E402

# The modules, whose names the package gives to their functions.
linear_module = importlib.import_module("octavo.kernels.gpu.linear")
gemv_module = importlib.import_module("octavo.kernels.gpu.gemv")
skinny_module = importlib.import_module("octavo.kernels.gpu.skinny")
decode_module = importlib.import_module("octavo.kernels.gpu.decode_attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
DTYPES = (torch.float32, HALF)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN (integers: a large negative), so an unwritten output shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.shape == expected.shape
    out, expected = out.double(), expected.double()
    error = ((out - expected).norm() / (expected.norm().item() or 1.0)).item()
    assert error < TOLERANCE[dtype], error  # NaN fails


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 7), (3, 48), (2, 576)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms(dtype: torch.dtype, rows: int, hidden: int, with_residual: bool) -> None:
    x, residual = randn(rows, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype)
    weight, bias = randn(hidden, dtype=dtype), randn(hidden, dtype=dtype)

    def compare(run: Any) -> None:
        outs = run(gpu, residual.clone() if with_residual else None)
        expected = run(reference, residual.clone() if with_residual else None)
        if not with_residual:
            outs, expected = (outs,), (expected,)
        for out, want in zip(outs, expected, strict=True):
            assert_close(out, want, dtype)

    compare(lambda ops, r: ops.rms_norm(x, weight, 1e-5, residual=r))
    compare(lambda ops, r: ops.rms_norm(x, weight, 1e-5, residual=r, weight_offset=1.0))
    compare(lambda ops, r: ops.layer_norm(x, weight, bias, 1e-5, residual=r))
    compare(lambda ops, r: ops.layer_norm(x, weight, None, 1e-5, residual=r))


# ----------------------------------------------------------------------------------- elementwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "gelu_new"])
def test_activations(dtype: torch.dtype, kind: str) -> None:
    x = randn(3, 2 * 1030, dtype=dtype)
    assert_close(gpu.activation(x, kind), reference.activation(x, kind), dtype)
    if kind in ("silu", "gelu", "gelu_tanh"):
        assert_close(gpu.gated_activation(x, kind), reference.gated_activation(x, kind), dtype)
    else:
        with pytest.raises(ValueError, match="unknown gated"):
            gpu.gated_activation(x, kind)
    wide = 5 * x
    want = reference.gated_activation(wide, "swiglu_clamped")
    assert_close(gpu.gated_activation(wide, "swiglu_clamped"), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    table, ids = randn(11, 1100, dtype=dtype), int32([10, 0, 3])
    for scale in (1.0, 33.5):
        want = reference.embedding(ids, table, scale=scale)
        assert_close(gpu.embedding(ids, table, scale=scale), want, dtype)
    assert (gpu.embedding(int32([11, -1]), table) == 0).all(), "foreign memory was read"


# ---------------------------------------------------------------------------------------- linear


def check_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, bias = randn(rows, k, dtype=dtype), randn(n, dtype=dtype)
    weight = (randn(n, k) * k**-0.5).to(dtype)
    norm, residual = randn(k, dtype=dtype), randn(rows, n, dtype=dtype)
    gated = randn(rows, n // 2, dtype=dtype)
    for b in (None, bias):
        assert_close(gpu.linear(x, weight, b), reference.linear(x, weight, b), dtype)
        wide = gpu.linear(x, weight, b, out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert_close(wide, reference.linear(x, weight, b, out_dtype=torch.float32), dtype)
        want = reference.linear(x, weight, b, residual=residual)
        assert_close(gpu.linear(x, weight, b, residual=residual.clone()), want, dtype)
        for offset in (0.0, 1.0):
            before = Norm(norm, 1e-5, offset)
            want = reference.linear(x, weight, b, norm=before)
            assert_close(gpu.linear(x, weight, b, norm=before), want, dtype)
        for kind in ("silu", "gelu_tanh"):
            for options in ({"gate": kind}, {"gate": kind, "norm": Norm(norm, 1e-5)}):
                want = reference.linear(x, weight, b, **options)
                assert_close(gpu.linear(x, weight, b, **options), want, dtype)
                want = reference.linear(x, weight, b, residual=gated, **options)
                out = gpu.linear(x, weight, b, residual=gated.clone(), **options)
                assert_close(out, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 36, 80), (2, 18, 48), (5, 70, 33), (65, 12, 16)])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_linear(rows, n, k, dtype)


def test_one_row_is_fused_where_the_weight_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel then; else a norm, a product and a gate, and the next norm adds the residual."""
    launched: list[str] = []
    for name in ("gemv", "rms_norm", "gated_activation"):
        run = getattr(linear_module, name)

        def note(*args: Any, _name: str = name, _run: Any = run, **options: Any) -> Any:
            launched.append(_name)
            return _run(*args, **options)

        monkeypatch.setattr(linear_module, name, note)
    limit = linear_module.MAX_FUSED_SIZE
    for k, expected in ((limit, ["gemv"]), (limit + 1, ["rms_norm", "gemv", "gated_activation"])):
        weight = gpu.prepare([randn(8, k)])
        weight.linear(randn(1, k), norm=Norm(randn(k), 1e-5), gate="silu")
        assert launched == expected
        launched.clear()
        weight.linear(randn(1, k))
        assert launched == ["gemv"]
        launched.clear()
    for n, fused in ((limit, True), (limit + 1, False)):
        weight = gpu.prepare([randn(n, 8)])
        assert weight.adds_residual(1) is fused
        assert not weight.adds_residual(2)


@pytest.mark.parametrize(("n", "k"), [(70, 33), (64, 32), (4, 100)])
def test_linear_of_many_rows_of_float32(n: int, k: int) -> None:
    x, weight, bias = randn(301, k), randn(n, k) * k**-0.5, randn(n)
    for b in (None, bias):
        assert_close(gpu.linear(x, weight, b), reference.linear(x, weight, b), torch.float32)


def test_linear_of_many_rows_of_float32_with_all_that_goes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":  # The interpreter's time is in proportion to the rows.
        monkeypatch.setattr(linear_module, "MIN_ROWS", 64)
    check_linear(linear_module.MIN_ROWS + 45, 70, 33, torch.float32)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("block_k", [128, 512])
def test_gemv_steps_over_k(prefetch: bool, block_k: int) -> None:
    x, weight, y = randn(1, 300), randn(10, 300), torch.empty(1, 10, device=DEVICE)
    config = gemv_module.GemvConfig(4, block_k, 4, prefetch)
    gemv_module.gemv(x, weight, None, y, config=config)
    assert_close(y, reference.linear(x, weight), torch.float32)


@pytest.mark.parametrize("split_k", [1, 2, 4])
@pytest.mark.parametrize("adds", [False, True])
def test_skinny_splits_k(split_k: int, adds: bool) -> None:
    """Also more parts than K has steps; the counters are zero again after each launch."""
    x, weight = randn(3, 100, dtype=HALF), randn(38, 100, dtype=HALF)
    bias = randn(38, dtype=HALF) if adds else None
    residual = randn(3, 38, dtype=HALF) if adds else None
    config = skinny_module.SkinnyConfig(16, 32, split_k, 4, 3)
    kept = None if residual is None else residual.clone()
    want = reference.linear(x, weight, bias, residual=kept)
    for _ in range(2):
        y = torch.full((3, 38), torch.nan, dtype=HALF, device=DEVICE)
        skinny_module.skinny(x, weight, bias, y, residual=residual, config=config)
        assert_close(y, want, HALF)


def test_linear_refuses() -> None:
    with pytest.raises(ValueError, match="weight"):
        gpu.linear(randn(1, 8), randn(4, 9))
    with pytest.raises(ValueError, match="contiguous"):
        gpu.linear(randn(8, 1).t(), randn(8, 4).t())


# ----------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 10), (1, 1, 80)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_qk_norm_rope_store_kv(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
    normed: bool,
    partial: bool,
) -> None:
    rows, block_size, num_blocks = 3, 3, 4
    rot = head_dim // 2 // 2 * 2 if partial else head_dim
    angles = torch.rand(20, rot // 2, device=DEVICE) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).contiguous()
    qkv = randn(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    caches = [randn(num_blocks, kv_heads, block_size, head_dim, dtype=dtype) for _ in range(2)]
    norms = [randn(head_dim, dtype=dtype) if normed else None for _ in range(2)]

    def run(ops: Any) -> list[torch.Tensor]:
        k_cache, v_cache = (cache.clone() for cache in caches)
        q = ops.qk_norm_rope_store_kv(
            qkv,
            int32([19, 0, 7]),
            cos_sin,
            int32([11, -1, 4]),
            k_cache,
            v_cache,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            q_norm=norms[0],
            k_norm=norms[1],
            eps=1e-6,
            weight_offset=0.5,
            interleaved=interleaved,
        )
        return [q, k_cache, v_cache]

    for out, want in zip(run(gpu), run(reference), strict=True):
        assert_close(out, want, dtype)


# ------------------------------------------------------------------------------------ attention


def check_attention(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    query_lens: list[int],
    contexts: list[int],
    num_decodes: int,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    has_sinks: bool = False,
    has_slopes: bool = False,
    **configs: Any,
) -> None:
    """Cache rows past each request's end hold NaN: reading one shows."""
    num_heads, num_kv_heads, head_dim = heads
    num_reqs = len(query_lens)
    seq_lens = [q + c for q, c in zip(query_lens, contexts, strict=True)]
    per_req = max(-(-length // block_size) for length in seq_lens)
    num_blocks = num_reqs * per_req + 3
    slots = torch.randperm(num_reqs + 2)[:num_reqs].to(DEVICE, torch.int32)
    blocks = torch.randperm(num_blocks)[: num_reqs * per_req].to(DEVICE, torch.int32)
    table = torch.zeros(num_reqs + 2, per_req, dtype=torch.int32, device=DEVICE)
    table[slots.long()] = blocks.view(num_reqs, per_req)
    caches = [randn(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype) for _ in range(2)]
    q = randn(sum(query_lens), num_heads, head_dim, dtype=dtype)
    starts = int32([0, *itertools.accumulate(query_lens)])
    rest = (table, slots, int32(seq_lens), starts)
    options: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "num_decodes": num_decodes,
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "sliding_window": window,
        "softcap": softcap,
        "causal": causal,
        "sinks": randn(num_heads) if has_sinks else None,
        "slopes": torch.rand(num_heads, device=DEVICE) if has_slopes else None,
    }
    want = reference.paged_attention(q, *caches, *rest, **options)
    for r, length in enumerate(seq_lens):
        for position in range(length, per_req * block_size):
            block = int(blocks[r * per_req + position // block_size])
            for cache in caches:
                cache[block, :, position % block_size] = float("nan")
    out = gpu.paged_attention(q, *caches, *rest, **options, **configs)
    assert_close(out, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "block_size"),
    [((4, 2, 8), 3), ((9, 3, 64), 16), ((3, 3, 10), 1), ((7, 1, 80), 16), ((2, 1, 96), 8)],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (70, 5.0)])
def test_decode_attention(
    dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, window: int, softcap: float
) -> None:
    contexts = [0, 300, 10, 130]
    check_attention(dtype, heads, block_size, [1] * 4, contexts, 4, window, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_decodes", [0, 2])
@pytest.mark.parametrize(
    ("heads", "block_size"), [((6, 2, 10), 4), ((9, 3, 64), 16), ((5, 1, 80), 3)]
)
@pytest.mark.parametrize(
    ("window", "softcap", "causal"),
    [(0, 0.0, True), (9, 5.0, True), (70, 0.0, True), (0, 0.0, False), (9, 0.0, False)],
)
def test_prefill_attention(
    dtype: torch.dtype,
    num_decodes: int,
    heads: tuple[int, int, int],
    block_size: int,
    window: int,
    softcap: float,
    causal: bool,
) -> None:
    lens, contexts = [1, 1, 5, 67, 1], [7, 0, 0, 40, 20]
    check_attention(dtype, heads, block_size, lens, contexts, num_decodes, window, softcap, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "has_sinks", "has_slopes"), [(70, True, False), (0, False, True)]
)
def test_attention_with_sinks_and_slopes(
    dtype: torch.dtype, window: int, has_sinks: bool, has_slopes: bool
) -> None:
    given = {"window": window, "has_sinks": has_sinks, "has_slopes": has_slopes}
    check_attention(dtype, (9, 3, 64), 16, [1] * 4, [0, 300, 10, 130], 4, **given)
    check_attention(dtype, (5, 1, 80), 3, [1, 1, 5, 67], [7, 200, 0, 40], 2, **given)
    check_rope_decode(dtype, (6, 2, 40), [1, 301, 0, 131], **given)


def test_decode_of_an_empty_request_is_zero() -> None:
    cache = randn(2, 1, 4, 8)
    out = gpu.paged_attention(
        randn(2, 2, 8),
        cache,
        cache,
        int32([[0], [1]]),
        int32([0, 1]),
        int32([0, 3]),
        int32([0, 1, 2]),
        scale=1.0,
        num_decodes=2,
        max_query_len=1,
        max_seq_len=4,
    )
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


def test_skewed_lengths_share_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of one request beside short ones, with the smallest chunks there are."""
    monkeypatch.setattr(decode_module, "MIN_CHUNK", 16)
    check_attention(torch.float32, (2, 2, 16), 4, [1] * 5, [3, 700, 0, 15, 16], 5)


def check_rope_decode(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    seq_lens: list[int],
    block_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    normed: bool = False,
    interleaved: bool = False,
    rot: int | None = None,
    cache_dtype: torch.dtype | None = None,
    has_sinks: bool = False,
    has_slopes: bool = False,
) -> None:
    """Against the two operations of the reference. A length of 0 is padding.

    Cache rows from the newest token on hold NaN, and so do the tables' unused entries' blocks.
    """
    num_heads, num_kv_heads, head_dim = heads
    rot = head_dim if rot is None else rot
    num_reqs = len(seq_lens)
    per_req = max(-(-length // block_size) for length in seq_lens) + 1
    slots = torch.randperm(num_reqs + 2)[:num_reqs].to(DEVICE, torch.int32)
    blocks = torch.randperm(num_reqs * per_req).to(DEVICE, torch.int32).view(num_reqs, per_req)
    table = torch.zeros(num_reqs + 2, per_req, dtype=torch.int32, device=DEVICE)
    table[slots.long()] = blocks
    caches = [
        randn(num_reqs * per_req, num_kv_heads, block_size, head_dim, dtype=cache_dtype or dtype)
        for _ in range(2)
    ]
    mapping = []
    for r, length in enumerate(seq_lens):
        for position in range(max(length - 1, 0), per_req * block_size):
            for cache in caches:
                cache[blocks[r, position // block_size], :, position % block_size] = float("nan")
        newest = int(blocks[r, (length - 1) // block_size]) * block_size + (length - 1) % block_size
        mapping.append(newest if length else -1)
    angles = torch.rand(max(seq_lens), rot // 2, device=DEVICE) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).contiguous()
    qkv = randn(num_reqs, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norms = [randn(head_dim, dtype=dtype) if normed else None for _ in range(2)]
    shared: dict[str, Any] = {
        "num_heads": num_heads,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "weight_offset": 0.5,
        "interleaved": interleaved,
    }
    masked: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "sliding_window": window,
        "softcap": softcap,
        "sinks": randn(num_heads) if has_sinks else None,
        "slopes": torch.rand(num_heads, device=DEVICE) if has_slopes else None,
    }
    lens = int32(seq_lens)
    want_caches = [cache.clone() for cache in caches]
    q = reference.qk_norm_rope_store_kv(
        qkv,
        (lens - 1).clamp(min=0),
        cos_sin,
        int32(mapping),
        *want_caches,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        **shared,
    )
    want = reference.paged_attention(
        q,
        *want_caches,
        table,
        slots,
        lens,
        int32(range(num_reqs + 1)),
        num_decodes=num_reqs,
        max_query_len=1,
        max_seq_len=max(seq_lens),
        **masked,
    )
    out = gpu.rope_decode_attention(
        qkv, cos_sin, int32(mapping), *caches, table, slots, lens, **shared, **masked
    )
    assert_close(out, want, dtype)
    assert all((out[r] == 0).all() for r, length in enumerate(seq_lens) if not length)
    for cache, want_cache in zip(caches, want_caches, strict=True):
        stored = want_cache.isfinite()
        assert (cache.isfinite() == stored).all()
        assert_close(cache[stored], want_cache[stored], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "block_size", "rot"),
    [((4, 2, 8), 3, 4), ((9, 3, 64), 16, 64), ((7, 1, 80), 16, 32), ((2, 1, 96), 8, 96)],
)
@pytest.mark.parametrize(
    ("window", "softcap", "normed"), [(0, 0.0, True), (70, 5.0, False), (1, 0.0, True)]
)
def test_rope_decode_attention(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    rot: int,
    window: int,
    softcap: float,
    normed: bool,
) -> None:
    options = {"window": window, "softcap": softcap, "normed": normed, "rot": rot}
    check_rope_decode(dtype, heads, [1, 301, 0, 131], block_size, **options)
    check_rope_decode(dtype, heads, [2, 64, 65, 66, 0, 129], block_size, **options)


@pytest.mark.parametrize("seq_lens", [[1], [700], [0, 0, 1], [3, 700, 1, 15, 0, 16]])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_decode_of_many_chunks(
    monkeypatch: pytest.MonkeyPatch, seq_lens: list[int], interleaved: bool
) -> None:
    monkeypatch.setattr(decode_module, "MIN_CHUNK", 16)
    check_rope_decode(torch.float32, (2, 2, 16), seq_lens, 4, interleaved=interleaved)


def test_rope_decode_rounds_to_the_caches_type() -> None:
    """The newest key and value count as a later step will read them."""
    check_rope_decode(torch.float32, (4, 2, 16), [1, 40], cache_dtype=HALF)


def test_rope_decode_refuses() -> None:
    cache, ints = randn(2, 2, 4, 8), int32([0])
    rest = (ints, cache, cache, int32([[0]]), ints, ints)
    with pytest.raises(ValueError, match="3 query heads do not divide among 2"):
        gpu.rope_decode_attention(randn(1, 56), randn(4, 8), *rest, num_heads=3, scale=1.0)
    with pytest.raises(ValueError, match="10 rotated values"):
        gpu.rope_decode_attention(randn(1, 64), randn(4, 10), *rest, num_heads=4, scale=1.0)
    with pytest.raises(ValueError, match="qkv must be"):
        gpu.rope_decode_attention(randn(1, 60), randn(4, 8), *rest, num_heads=4, scale=1.0)


# ------------------------------------------------------------------------------------- sampling


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D & 0xFFFFFFFF
    h ^= h >> 15
    h = h * 0x846CA68B & 0xFFFFFFFF
    return h ^ (h >> 16)


def hash_uniform(seed: int, position: int) -> float:
    h = mix((seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    h = mix(h ^ ((seed >> 32) & 0xFFFFFFFF))
    return (mix(h ^ position) >> 8) * 2**-24


def make_table(count: int) -> torch.Tensor:
    """A slot table [count, RECORD_LEN] of neutral records."""
    table = torch.zeros(count, slots_module.RECORD_LEN, dtype=torch.int32)
    for column in slots_module.COLUMNS:
        set_column(table, column, column.neutral)
    return table


def set_column(table: torch.Tensor, column: Any, values: Any) -> None:
    typed = table.view(torch.float32) if column.is_float else table
    typed[:, column.index] = torch.as_tensor(values, dtype=typed.dtype, device=table.device)


def get_column(table: torch.Tensor, column: Any) -> torch.Tensor:
    return (table.view(torch.float32) if column.is_float else table)[:, column.index]


def make_state(
    settings: list[tuple[float, int, float, float]], **extra: Any
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(state, slots, uniform): settings are (temperature, top_k, top_p, min_p) of each row."""
    count = len(settings)
    slots = torch.randperm(count)
    table = make_table(count)

    def by_slot(column: Any, values: list[float]) -> None:
        placed = torch.zeros(count, dtype=torch.float32 if column.is_float else torch.int64)
        placed[slots] = torch.tensor(values, dtype=placed.dtype)
        set_column(table, column, placed)

    for i, name in enumerate(("TEMPERATURE", "TOP_K", "TOP_P", "MIN_P")):
        by_slot(getattr(slots_module, name), [row[i] for row in settings])
    seeds = torch.randint(-(2**62), 2**62, (count,))
    table[:, slots_module.SEED_LOW.index : slots_module.SEED_HIGH.index + 1] = seeds.view(
        torch.int32
    ).view(count, 2)
    positions = torch.randint(0, 1000, (count,))
    set_column(table, slots_module.OUTPUT_POSITION, positions)
    uniform = [hash_uniform(int(seeds[s]), int(positions[s])) for s in slots.tolist()]
    state = gpu.SamplingState(table.to(DEVICE), **extra)
    return state, slots.to(DEVICE, torch.int32), torch.tensor(uniform, device=DEVICE)


def check_sample(vocab: int, settings: list[tuple[float, int, float, float]]) -> None:
    logits = randn(len(settings), vocab) * 3
    state, slots, uniform = make_state(settings)
    before = get_column(state.slot_table, slots_module.OUTPUT_POSITION).clone()
    columns = [torch.tensor([row[c] for row in settings]) for c in range(4)]
    want = reference.sample(logits.cpu(), *columns, uniform.cpu()).tolist()
    got = gpu.sample(logits.clone(), slots, state).tolist()
    # A sum's rounding may tip a draw that falls between two tokens.
    wrong = [(s, g, w) for s, g, w in zip(settings, got, want, strict=True) if g != w]
    assert len(wrong) <= len(settings) // 50, wrong
    assert (get_column(state.slot_table, slots_module.OUTPUT_POSITION) == before + 1).all()
    last = get_column(state.slot_table, slots_module.LAST_TOKEN)
    assert last[slots.long()].tolist() == got


SETTINGS = list(itertools.product((0.0, 0.7, 2.0), (0, 1, 50, 3000), (1.0, 0.9, 0.3), (0.0, 0.05)))


def test_sample() -> None:
    check_sample(9001, SETTINGS)


def test_sample_greedy_ties_give_the_lowest_id() -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[1, 4500] = logits[1, 8999] = 1.0
    state, slots, _ = make_state([(0.0, 0, 1.0, 0.0)] * 2)
    assert gpu.sample(logits, slots, state).tolist() == [0, 4500]


@pytest.mark.parametrize("turn", [0, 2])
def test_sample_tells_the_host(turn: int) -> None:
    rows, width = 5, 9
    logits = randn(rows, 700)
    state, slots, _ = make_state([(0.0, 0, 1.0, 0.0)] * rows)
    ids = torch.full((3, width), -7, dtype=torch.int32, pin_memory=DEVICE == "cuda")
    # As in a step's header, at an address that is no multiple of 16.
    host = gpu.HostIds(ids, int32([9, 9, 9, turn])[3:])
    chosen = gpu.sample(logits, slots, state, host)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert chosen.tolist() == logits.argmax(1).tolist()
    assert ids[turn, :rows].tolist() == chosen.tolist()
    ids[turn, :rows] = -7
    assert (ids == -7).all(), "nothing else was written"


def test_sample_wants_room_on_the_host() -> None:
    state, slots, _ = make_state([(0.0, 0, 1.0, 0.0)] * 3)
    with pytest.raises(ValueError, match="3 ids do not fit 2"):
        gpu.sample(randn(3, 50), slots, state, gpu.HostIds(int32([[0, 0]]), int32([0])))


def test_sample_keeps_the_equals_of_the_kth() -> None:
    logits = torch.full((24, 600), -5.0, device=DEVICE)
    logits[:, [7, 300, 599]] = 2.0
    state, slots, _ = make_state([(1.0, 2, 1.0, 0.0)] * 24)
    assert set(gpu.sample(logits, slots, state).tolist()) == {7, 300, 599}


def test_sample_of_masked_rows_gives_an_allowed_token_or_none() -> None:
    logits = torch.full((3, 5000), float("-inf"), device=DEVICE)
    logits[0, 4999] = -50.0
    state, slots, _ = make_state([(1.0, 0, 1.0, 0.0), (1.0, 5, 0.5, 0.1), (0.0, 0, 1.0, 0.0)])
    assert gpu.sample(logits, slots, state).tolist() == [4999, -1, -1]


def test_sample_adjusts_logits() -> None:
    vocab, rows = 5000, 2
    counts = torch.zeros(rows, vocab, dtype=torch.int16, device=DEVICE)
    allowed = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32, device=DEVICE)
    state, slots, _ = make_state(
        [(0.0, 0, 1.0, 0.0)] * rows,
        token_counts=counts,
        bias_ids=int32([[17, -1, 4100]] * rows),
        bias_values=torch.tensor([[1.5, 9.0, 7.0]] * rows, device=DEVICE),
        bias_until=int32([[2**31 - 1, 2**31 - 1, 0]] * rows),
        allowed_mask=allowed,
    )
    set_column(state.slot_table, slots_module.REPETITION_PENALTY, 2.0)
    set_column(state.slot_table, slots_module.PRESENCE_PENALTY, 0.25)
    set_column(state.slot_table, slots_module.FREQUENCY_PENALTY, 0.5)
    counts[:, 3] = 2  # generated twice
    counts[:, 4] = 0x4000  # in the prompt
    allowed[:, 0] &= ~(1 << 5)
    logits = torch.full((rows, vocab), -1.0, device=DEVICE)
    logits[:, 3], logits[:, 4], logits[:, 5], logits[:, 17] = 4.0, 4.0, 10.0, 0.25
    out = gpu.sample(logits, slots, state)
    # 3: 4 / 2 - 2 * 0.5 - 0.25 = 0.75; 4: 4 / 2 = 2; 5: not allowed; 17: 0.25 + 1.5 = 1.75.
    row = logits[0]
    assert [row[i].item() for i in (3, 4, 17, 4100)] == [0.75, 2.0, 1.75, -1.0]
    assert row[5].item() == float("-inf")
    assert out.tolist() == [4, 4]
    assert get_column(state.slot_table, slots_module.LAST_TOKEN).tolist() == [4, 4]
    assert counts[:, 4].tolist() == [0x4001, 0x4001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [37, 4099])
@pytest.mark.parametrize("parts", ["bias", "allowed", "penalties", "all"])
def test_adjust_logits(dtype: torch.dtype, vocab: int, parts: str) -> None:
    """Each part alone and all of them, with rows in other slots and one slot without any."""
    rows, num_slots, width = 3, 5, 45
    slots = torch.randperm(num_slots)[:rows].to(DEVICE, torch.int32)
    table = make_table(num_slots).to(DEVICE)
    logits = randn(rows, vocab, dtype=dtype) * 3
    counts = torch.randint(0, 3, (num_slots, vocab), dtype=torch.int16, device=DEVICE)
    counts[:, ::3] |= 0x4000
    bits = torch.randint(-(2**31), 2**31, (num_slots, -(-vocab // 32)), device=DEVICE).int()
    penalties = torch.rand(3, num_slots, device=DEVICE) + 0.5
    penalties[:, slots[0]] = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    ids = torch.full((num_slots, width), -1, dtype=torch.int32, device=DEVICE)
    named = min(vocab, 40)
    ids[:, :named] = torch.stack([torch.randperm(vocab)[:named] for _ in range(num_slots)])
    values = randn(num_slots, width)
    until = torch.randint(0, 2, (num_slots, width), device=DEVICE).int()

    extra: dict[str, Any] = {}
    want: dict[str, Any] = {
        "bias": torch.zeros(rows, vocab, device=DEVICE),
        "allowed": torch.ones(rows, vocab, dtype=torch.bool, device=DEVICE),
        "generated": torch.zeros(rows, vocab, dtype=torch.int32, device=DEVICE),
        "in_prompt": torch.zeros(rows, vocab, dtype=torch.bool, device=DEVICE),
        "repetition_penalty": torch.ones(rows, device=DEVICE),
        "presence_penalty": torch.zeros(rows, device=DEVICE),
        "frequency_penalty": torch.zeros(rows, device=DEVICE),
    }
    at = slots.long()
    if parts in ("bias", "all"):
        extra |= {"bias_ids": ids, "bias_values": values, "bias_until": until}
        # Every request is at its token 0.
        active = (ids[at] >= 0) & (until[at] > 0)
        for row in range(rows):
            want["bias"][row, ids[at][row][active[row]].long()] = values[at][row][active[row]]
    if parts in ("allowed", "all"):
        extra["allowed_mask"] = bits
        cols = torch.arange(vocab, device=DEVICE)
        want["allowed"] = bits[at][:, cols // 32] >> (cols % 32) & 1 != 0
    if parts in ("penalties", "all"):
        extra["token_counts"] = counts
        want["generated"] = counts[at].int() & 0x3FFF
        want["in_prompt"] = counts[at] & 0x4000 != 0
        for i, name in enumerate(("repetition", "presence", "frequency")):
            set_column(table, getattr(slots_module, f"{name.upper()}_PENALTY"), penalties[i])
            want[f"{name}_penalty"] = penalties[i][at]
    expected = reference.adjust_logits(logits, **want)
    got = logits.clone()
    gpu.adjust_logits(got, slots, gpu.SamplingState(table, **extra))
    allowed = want["allowed"]
    assert (got[~allowed] == float("-inf")).all()
    assert_close(got[allowed], expected[allowed], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [37, 9001])
@pytest.mark.parametrize("settings", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.9, 5, 0.8, 0.01)])
def test_a_mask_has_the_last_word(dtype: torch.dtype, vocab: int, settings: Any) -> None:
    """Rows in any order, some of them without a mask; one token in fifty may come."""
    num, width = 12, -(-vocab // 32)
    logits = randn(num, vocab, dtype=dtype)
    bits = torch.rand(num, width * 32) < 0.02
    bits[:, torch.randint(vocab, (num,))] = True
    words = (bits.view(num, width, 32).long() << torch.arange(32)).sum(-1)
    masks = (words - ((words >> 31) << 32)).int().to(DEVICE)
    rows = [3, -1, 0, 4, 7, 11, 5, -1, 9, 1]
    index = torch.full((num + 4,), -1, dtype=torch.int32, device=DEVICE)
    for number, row in enumerate(rows):
        if row >= 0:
            index[row] = number
    expected = reference.mask_logits(logits, int32(rows), masks[: len(rows)])
    state, slots, _ = make_state([settings] * num)
    same = gpu.SamplingState(state.slot_table.clone())
    plain = gpu.sample(expected, slots, same)
    before = logits.clone()
    found = gpu.sample(logits, slots, state, masks=gpu.TokenMasks(index, masks))
    assert found.tolist() == plain.tolist()
    assert torch.equal(logits, before)
    masked = [row for row in rows if row >= 0]
    assert all(bits[rows.index(row), found[row]] for row in masked)
    with pytest.raises(ValueError, match="words"):
        gpu.sample(logits, slots, state, masks=gpu.TokenMasks(index, masks[:, 1:].contiguous()))
    with pytest.raises(ValueError, match="masks"):
        gpu.sample(logits, slots, state, masks=gpu.TokenMasks(index[:3], masks))


def test_a_row_without_any_token_is_told_apart() -> None:
    state, slots, _ = make_state([(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.0)])
    logits = randn(3, 700)
    logits[1:] = float("-inf")
    chosen = gpu.sample(logits, slots, state)
    assert chosen.tolist() == [int(logits[0].argmax()), -1, -1]
    # The next step's input is a valid id all the same.
    last = get_column(state.slot_table, slots_module.LAST_TOKEN)[slots.long()]
    assert ((last >= 0) & (last < 700)).all()


def test_a_part_of_the_bias_is_refused() -> None:
    state = gpu.SamplingState(make_table(1).to(DEVICE), bias_ids=int32([[1]]))
    with pytest.raises(ValueError, match="come together"):
        gpu.sample(randn(1, 9), int32([0]), state)


# ------------------------------------------------------------------------ real shapes, on a GPU

LLAMA_8B, LLAMA_1B, SMOLLM2 = (32, 8, 128), (32, 8, 64), (9, 3, 64)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 24, 64, 256])
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 14336), (16384, 2048), (960, 576), (576, 1536)]
)
def test_linear_real(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_linear(rows, n, k, dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 1000])
@pytest.mark.parametrize(("n", "k"), [(1152, 384), (384, 1536), (960, 576), (4097, 1030)])
def test_linear_of_float32_is_as_exact_as_float32(rows: int, n: int, k: int) -> None:
    """Against float64, no further from it than cuBLAS's float32."""
    x, weight, bias = randn(rows, k), randn(n, k) * k**-0.5, randn(n)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    errors = [
        float((found.double() - want).norm() / want.norm())
        for found in (gpu.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    ]
    assert errors[0] <= max(errors[1], 3e-7)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [LLAMA_8B, LLAMA_1B, SMOLLM2, (8, 4, 256), (32, 32, 80)])
@pytest.mark.parametrize("window", [0, 512])
def test_attention_real(dtype: torch.dtype, heads: tuple[int, int, int], window: int) -> None:
    check_attention(dtype, heads, 16, [1], [1000], 1, window)
    check_attention(dtype, heads, 16, [1] * 40, [17 * i for i in range(40)], 40, window)
    check_attention(dtype, heads, 16, [1, 1, 1, 300, 77], [900, 3, 64, 0, 500], 3, window)
    check_attention(dtype, heads, 16, [1, 1, 9, 700], [900, 3, 64, 1], 0, window)


@needs_gpu
@pytest.mark.gpu
def test_sample_real() -> None:
    check_sample(128256, SETTINGS)
    check_sample(49152, SETTINGS)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_graph_replays_like_eager(pdl: bool) -> None:
    """A layer's worth of kernels, captured, replayed on new lengths; split counters included."""
    heads, kv_heads, head_dim = SMOLLM2
    rows, hidden, blocks = 4, 576, 64
    weights = [randn(960, hidden, dtype=HALF) / 24, randn(hidden, hidden, dtype=HALF) / 24]
    norm, x = randn(hidden, dtype=HALF), randn(rows, hidden, dtype=HALF)
    caches = [randn(blocks * rows, kv_heads, 16, head_dim, dtype=HALF) for _ in range(2)]
    table = torch.arange(blocks * rows, dtype=torch.int32, device=DEVICE).view(rows, blocks)
    cos_sin = torch.rand(1100, head_dim, device=DEVICE)
    slots, starts = int32(range(rows)), int32(range(rows + 1))
    seq_lens, positions, mapping = int32([0] * rows), int32([0] * rows), int32([0] * rows)
    state, _, _ = make_state([(0.0, 0, 1.0, 0.0)] * rows)
    head = randn(5000, hidden, dtype=HALF)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        qkv = gpu.linear(x, weights[0], norm=Norm(norm, 1e-5))
        q = gpu.qk_norm_rope_store_kv(
            qkv,
            positions,
            cos_sin,
            mapping,
            *caches,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )
        out = gpu.paged_attention(
            q,
            *caches,
            table,
            slots,
            seq_lens,
            starts,
            scale=0.125,
            num_decodes=rows,
            max_query_len=1,
            max_seq_len=1024,
        )
        hidden_states = gpu.linear(out, weights[1], residual=x.clone())
        logits = gpu.linear(hidden_states, head, out_dtype=torch.float32)
        return hidden_states, gpu.sample(logits, slots, state)

    def set_lengths(lengths: list[int]) -> None:
        seq_lens.copy_(int32(lengths))
        positions.copy_(seq_lens - 1)
        mapping.copy_(
            table.gather(1, (positions // 16).long()[:, None])[:, 0] * 16 + positions % 16
        )

    gpu.set_pdl(pdl)
    try:
        set_lengths([1, 1000, 30, 500])
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            step()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        step()
        for lengths in ([1, 1000, 30, 500], [1024, 2, 1023, 700], [5, 6, 7, 8]):
            set_lengths(lengths)
            eager = [t.clone() for t in step()]
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            assert_close(captured[0], eager[0], HALF)
            assert captured[1].tolist() == eager[1].tolist()
    finally:
        gpu.set_pdl(False)


# --------------------------------------------------------------------------------------- compiling


@pytest.mark.gpu
@needs_gpu
def test_compile_only_runs_nothing() -> None:
    x, weight = randn(3, 72), randn(72)
    for _ in range(2):
        with gpu.compile_only():
            assert gpu.rms_norm(x, weight, 1e-5).isnan().all()
        out = gpu.rms_norm(x, weight, 1e-5)
        assert_close(out, reference.rms_norm(x, weight, 1e-5), torch.float32)


# -------------------------------------------------------------------------------------------- moe


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"), [(1, 5, 2), (3, 4, 4), (37, 6, 3), (70, 2, 1)]
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_moe(
    dtype: torch.dtype, tokens: int, num_experts: int, top_k: int, renormalize: bool
) -> None:
    hidden, inner = 72, 40
    x = randn(tokens, hidden, dtype=dtype)
    router = randn(tokens, num_experts)
    router[:, 1] -= 100  # nobody's first choice: an expert without rows when top_k allows it
    w13 = (randn(num_experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
    w2 = (randn(num_experts, hidden, inner) / inner**0.5).to(dtype)
    experts = gpu.prepare_experts([w.chunk(2) for w in w13], list(w2))
    routing = Routing(top_k, renormalize)
    assert_close(experts.mix(x, router, routing), reference.moe(x, router, w13, w2, routing), dtype)
    for first, last in ((0, 1), (1, num_experts)):
        some = gpu.prepare_experts([w.chunk(2) for w in w13[first:last]], list(w2[first:last]))
        want = reference.moe(x, router, w13[first:last], w2[first:last], routing, first=first)
        assert_close(some.mix(x, router, routing, first=first), want, dtype)
    biases = ExpertBiases(
        randn(num_experts, 2 * inner, dtype=dtype), randn(num_experts, hidden, dtype=dtype)
    )
    experts = gpu.prepare_experts([w.chunk(2) for w in w13], list(w2), biases=biases)
    want = reference.moe(x, router, w13, w2, routing, biases=biases, kind="swiglu_clamped")
    assert_close(experts.mix(x, router, routing, kind="swiglu_clamped"), want, dtype)
    ungated = w13[:, :inner].contiguous()
    experts = gpu.prepare_experts([[w] for w in ungated], list(w2))
    want = reference.moe(x, router, ungated, w2, routing, kind="relu2")
    assert_close(experts.mix(x, router, routing, kind="relu2"), want, dtype)
