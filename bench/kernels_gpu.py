"""Checks and times every GPU kernel at the shapes of three models; prints one table.

    PYTHONPATH=python python3 bench/kernels_gpu.py [--only linear,decode] [--models 8B] [--sweep]

Correctness first, against kernels/reference.py with fresh inputs and NaN-filled outputs; then the
time of a call inside a CUDA graph, over inputs rotated beyond the L2 cache, as a share of this
GPU's own ceilings (a device copy and a matrix product, measured first). ``--sweep`` also times
alternative tiles; ``--pdl`` switches programmatic dependent launch on.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from octavo.kernels import reference
from octavo.kernels.gpu import ops as gpu
from octavo.kernels.weights import Norm
from octavo.runner.request_state import RequestState
from octavo.runner.slots import SlotRecords
from octavo.sampling_params import SamplingParams

# The modules, whose names the package gives to their functions.
attention = importlib.import_module("octavo.kernels.gpu.attention")
gemv = importlib.import_module("octavo.kernels.gpu.gemv")
linear = importlib.import_module("octavo.kernels.gpu.linear")
skinny = importlib.import_module("octavo.kernels.gpu.skinny")

# (hidden, heads, kv_heads, head_dim, intermediate, vocab)
MODELS = {
    "8B": (4096, 32, 8, 128, 14336, 128256),
    "1B": (2048, 32, 8, 64, 8192, 128256),
    "135M": (576, 9, 3, 64, 1536, 49152),
}
DTYPE = torch.bfloat16
MAX_ERROR = 1e-2
ROTATED_BYTES = 256 << 20  # five times the L2 cache
BLOCK_SIZE = 16
SWEEP_TILES = 12  # of each shape: each costs a second of compiling

Call = Callable[[], Any]
rows: list[dict[str, Any]] = []
ceilings = {"GB/s": 0.0, "TFLOP/s": 0.0}


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def graph_ms(calls: list[Call]) -> tuple[float, float]:
    """(median, spread) of one call in ms: all of them in one graph, replayed 15 times."""
    # The counters of split kernels are a stream's.
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        calls[0]()
        begin.record()
        calls[-1]()
        end.record()
    end.synchronize()
    # Some 20 calls, of long ones fewer.
    most = max(20, len(calls)) if begin.elapsed_time(end) < 1 else 4
    calls = calls[:most]
    repeats = max(1, most // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / (repeats * len(calls)))
    return statistics.median(times), max(times) - min(times)


def rotations(bytes_each: float) -> int:
    """The number of input sets that keep a call from finding its own in the cache."""
    return int(max(1, min(64, -(-ROTATED_BYTES // max(bytes_each, 1)))))


def poisoned(function: Call) -> Any:
    """Runs with torch.empty filled by NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))

    torch.empty = lambda *a, **k: spoil(empty(*a, **k))
    torch.empty_like = lambda *a, **k: spoil(empty_like(*a, **k))
    try:
        return function()
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    return ((out.double() - want.double()).norm() / want.double().norm()).item()


def report(
    op: str, shape: str, error: float, calls: list[Call], amount: float, unit: str = "GB/s"
) -> None:
    """Times ``calls`` (one shape, several inputs) and keeps a row. amount: bytes or FLOPs."""
    ms, spread = graph_ms(calls)
    rate = amount / ms / (1e6 if unit == "GB/s" else 1e9)
    share = rate / ceilings[unit]
    rows.append(
        {"op": op, "shape": shape, "error": error, "us": ms * 1e3, "spread_us": spread * 1e3}
        | {"rate": rate, "unit": unit, "share": share}
    )
    print(
        f"{'ok  ' if error < MAX_ERROR else 'BAD '}{op:24s} {shape:34s} err {error:8.1e} "
        f"{ms * 1e3:9.2f} us +-{spread * 1e3:6.2f} {rate:7.1f} {unit:7s} {share:4.0%}",
        flush=True,
    )


def guarded(op: str, shape: str, work: Call) -> None:
    """Runs one case; a failure becomes a row, and the other cases still run."""
    try:
        work()
    except Exception as failure:
        rows.append({"op": op, "shape": shape, "failure": repr(failure)[:500]})
        print(f"FAIL {op:24s} {shape}: {str(failure)[:300]}", flush=True)


def measure_ceilings() -> None:
    big = randn(1 << 29)
    target = torch.empty_like(big)
    ceilings["GB/s"] = 4 * big.numel() / graph_ms([lambda: target.copy_(big)])[0] / 1e6
    a, b = big[: 1 << 26].view(8192, 8192), big[1 << 26 : 1 << 27].view(8192, 8192)
    ceilings["TFLOP/s"] = 2 * 8192**3 / graph_ms([lambda: torch.mm(a, b)])[0] / 1e9
    tiny = randn(8)
    node, _ = graph_ms([lambda: gpu.activation(tiny, "relu")] * 20)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {ceilings['GB/s']:.0f} "
        f"GB/s, bf16 matmul {ceilings['TFLOP/s']:.0f} TFLOP/s, one tiny node {node * 1e3:.2f} us"
    )


# ---------------------------------------------------------------------------------------- linear


def weight_shapes() -> Iterator[tuple[str, str, int, int]]:
    for model, (hidden, heads, kv_heads, head_dim, inter, vocab) in MODELS.items():
        yield model, "qkv", (heads + 2 * kv_heads) * head_dim, hidden
        yield model, "o", hidden, heads * head_dim
        yield model, "gate_up", 2 * inter, hidden
        yield model, "down", hidden, inter
        yield model, "head", vocab, hidden


def bench_linear(sweep: bool) -> None:
    for model, name, n, k in weight_shapes():
        weights = [randn(n, k) / k**0.5 for _ in range(rotations(2 * n * k))]
        for m in (1, 2, 4, 8, 16, 32, 64, 256):
            shape = f"{model} {name} M={m} {n}x{k}"
            guarded(
                "linear",
                shape,
                functools.partial(linear_case, shape, name, m, weights),
            )
            if sweep and name != "head" and m in (1, 4, 16, 64):
                guarded("sweep", shape, functools.partial(sweep_linear, shape, m, weights))


def linear_case(shape: str, name: str, m: int, weights: list[torch.Tensor]) -> None:
    n, k = weights[0].shape
    x, norm, residual = randn(m, k), randn(k), randn(m, n)
    unit = "GB/s" if m < 256 else "TFLOP/s"
    amount = 2.0 * (n * k + m * (n + k)) if m < 256 else 2.0 * m * n * k

    def time_op(label: str, want: torch.Tensor, op: Callable[[torch.Tensor], torch.Tensor]) -> None:
        error = error_of(poisoned(lambda: op(weights[0])), want)
        report(label, shape, error, [functools.partial(op, w) for w in weights], amount, unit)

    want = reference.linear(x, weights[0])
    way = linear.plan_linear(m, n, DTYPE)
    time_op(f"linear {way}", want, lambda w: gpu.linear(x, w))
    if way != "cublas":
        time_op("  cublas", want, lambda w: torch.nn.functional.linear(x, w))
    if m > 1 or name == "head":
        return
    if name in ("gate_up", "qkv"):
        # Fused at every size, so that both sides of MAX_FUSED_SIZE are seen.
        before, gate = Norm(norm, 1e-5), "silu" if name == "gate_up" else ""
        want = reference.linear(x, weights[0], norm=before, gate=gate)
        y = torch.empty_like(want)
        fused = {"norm_weight": norm, "eps": 1e-5, "gate": gate}
        time_op("gemv of a norm", want, lambda w: gemv.gemv(x, w, None, y, **fused))
    else:
        want = reference.linear(x, weights[0], residual=residual)
        error = error_of(gpu.linear(x, weights[0], residual=residual.clone()), want)
        calls = [functools.partial(gpu.linear, x, w, residual=residual) for w in weights]
        report("linear and residual", shape, error, calls, amount, unit)


def sweep_linear(shape: str, m: int, weights: list[torch.Tensor]) -> None:
    """Alternative tiles; prints the three best."""
    n, k = weights[0].shape
    x, y = randn(m, k), randn(m, n)
    configs: list[Any] = []
    if m == 1:
        for block_n, block_k, warps, prefetch in itertools.product(
            (2, 4, 8), (512, 1024, 2048), (4, 8), (False, True)
        ):
            if block_n * block_k // (32 * warps) in (16, 32, 64) and block_k < 2 * k:
                configs.append(gemv.GemvConfig(block_n, block_k, warps, prefetch))
    else:
        for block_n, block_k, split, stages in itertools.product(
            (16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (3, 5)
        ):
            programs = -(-n // block_n) * split
            shared = block_k * (block_n + max(m, 16)) * 2 * (stages - 1)
            if 64 <= programs <= 1200 and split * block_k * 2 <= k and shared < 150_000:
                configs.append(skinny.SkinnyConfig(block_n, block_k, split, 4, stages))
    configs = configs[:: -(-len(configs) // SWEEP_TILES)]
    run = gemv.gemv if m == 1 else skinny.skinny
    found = []
    for config in configs:
        calls = [functools.partial(run, x, w, None, y, config=config) for w in weights]
        found.append((graph_ms(calls)[0], config))
    for ms, config in sorted(found)[:3]:
        share = 2 * n * k / ms / 1e6 / ceilings["GB/s"]
        print(f"     sweep {shape:34s} {ms * 1e3:8.2f} us {share:4.0%} {tuple(config)}", flush=True)
        rows.append({"op": "sweep", "shape": shape, "us": ms * 1e3, "tile": tuple(config)})


# ------------------------------------------------------------------------------------ attention


def attention_case(
    heads: tuple[int, int, int], query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> tuple[list[Call], float]:
    """(calls on rotated caches, the error of the first)."""
    num_heads, num_kv_heads, head_dim = heads
    num_reqs, per_req = len(query_lens), -(-max(seq_lens) // BLOCK_SIZE)
    blocks = num_reqs * per_req
    table = torch.randperm(blocks, device="cuda").to(torch.int32).view(num_reqs, per_req)
    starts = int32([0, *itertools.accumulate(query_lens)])
    rest = (table, int32(range(num_reqs)), int32(seq_lens), starts)
    options = {
        "scale": head_dim**-0.5,
        "num_decodes": num_decodes,
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
    }
    q = randn(sum(query_lens), num_heads, head_dim)
    count = min(rotations(4 * sum(seq_lens) * num_kv_heads * head_dim), 16)
    shape = (blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    caches = [(randn(*shape), randn(*shape)) for _ in range(count)]
    calls = [functools.partial(gpu.paged_attention, q, k, v, *rest, **options) for k, v in caches]
    want = reference.paged_attention(q, *caches[0], *rest, **options)
    return calls, error_of(poisoned(calls[0]), want)


def rope_decode_case(heads: tuple[int, int, int], seq_lens: list[int]) -> tuple[list[Call], float]:
    """As attention_case, of decodes alone and from qkv on: it also stores keys and values."""
    num_heads, num_kv_heads, head_dim = heads
    num_reqs, per_req = len(seq_lens), -(-max(seq_lens) // BLOCK_SIZE)
    blocks = num_reqs * per_req
    table = torch.randperm(blocks, device="cuda").to(torch.int32).view(num_reqs, per_req)
    slots, lens = int32(range(num_reqs)), int32(seq_lens)
    last = (lens - 1).long()
    newest = table[slots.long(), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    mapping = newest.to(torch.int32)
    cos_sin = torch.rand(max(seq_lens), head_dim, device="cuda")
    qkv = randn(num_reqs, (num_heads + 2 * num_kv_heads) * head_dim)
    count = min(rotations(4 * sum(seq_lens) * num_kv_heads * head_dim), 16)
    shape = (blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    caches = [(randn(*shape), randn(*shape)) for _ in range(count)]
    scale = head_dim**-0.5
    calls = [
        functools.partial(
            gpu.rope_decode_attention, qkv, cos_sin, mapping, k, v, table, slots, lens,
            num_heads=num_heads, scale=scale,
        )
        for k, v in caches
    ]  # fmt: skip
    k, v = (cache.clone() for cache in caches[0])
    q = reference.qk_norm_rope_store_kv(
        qkv, lens - 1, cos_sin, mapping, k, v,
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    want = reference.paged_attention(
        q, k, v, table, slots, lens, int32(range(num_reqs + 1)),
        scale=scale, num_decodes=num_reqs, max_query_len=1, max_seq_len=max(seq_lens),
    )  # fmt: skip
    return calls, error_of(poisoned(calls[0]), want)


def bench_decode(sweep: bool) -> None:
    for model, (_, num_heads, kv_heads, head_dim, _, _) in MODELS.items():
        cases = {
            "R=1 len=128": [128],
            "R=1 len=1024": [1024],
            "R=1 len=8192": [8192],
            "R=16 len=1024": [1024] * 16,
            "R=64 len=768": [768] * 64,
            "R=64 60x128+4x8000": [128] * 60 + [8000] * 4,
            "R=256 len=640": [640] * 256,
        }
        for label, lens in cases.items():
            shape = f"{model} {label}"
            tiles = [
                (block_n, 4, stages)
                for block_n, stages in itertools.product((32, 64, 128), (3, 5, 7))
                if sweep and label in ("R=1 len=1024", "R=64 len=768")
                if block_n * head_dim * 4 * (stages // 2) <= 150_000
            ]

            def work(
                lens: list[int] = lens,
                shape: str = shape,
                heads: tuple[int, int, int] = (num_heads, kv_heads, head_dim),
                tiles: list[tuple[int, int, int]] = tiles,
            ) -> None:
                calls, error = attention_case(heads, [1] * len(lens), lens, len(lens))
                amount = 4.0 * heads[2] * (sum(lens) * heads[1] + len(lens) * heads[0])
                report("decode", shape, error, calls, amount)
                if len(lens) <= gpu.max_rope_decodes(heads[2]):
                    fused, error = rope_decode_case(heads, lens)
                    report("rope_decode_attention", shape, error, fused, amount)
                for tile in tiles:
                    tiled = [functools.partial(call, decode_config=tile) for call in calls]
                    report(f"  decode {tile}", shape, error, tiled, amount)

            guarded("decode", shape, work)


def bench_prefill(sweep: bool) -> None:
    tiles = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2))
    for model, (_, num_heads, kv_heads, head_dim, _, _) in MODELS.items():
        cases = {
            "1x128": ([128], [128]),
            "1x1024": ([1024], [1024]),
            "16x512": ([512] * 16, [512] * 16),
            "1x4096": ([4096], [4096]),
            "256 after 3840": ([256], [4096]),
            "mixed 63x1 + 449": ([1] * 63 + [449], [600] * 63 + [449]),
        }
        for label, (query_lens, seq_lens) in cases.items():
            shape = f"{model} {label}"

            def work(
                query_lens: list[int] = query_lens,
                seq_lens: list[int] = seq_lens,
                shape: str = shape,
                heads: tuple[int, int, int] = (num_heads, kv_heads, head_dim),
            ) -> None:
                pairs = sum(
                    q * (s - q) + q * (q + 1) / 2 for q, s in zip(query_lens, seq_lens, strict=True)
                )
                flops = 4.0 * pairs * heads[0] * heads[2]
                calls, error = attention_case(heads, query_lens, seq_lens, 0)
                report("prefill", shape, error, calls, flops, "TFLOP/s")
                if len(query_lens) == 1 and query_lens == seq_lens:
                    q, k, v = (randn(1, heads[0], query_lens[0], heads[2]) for _ in range(3))
                    sdpa = functools.partial(
                        torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True
                    )
                    report("  torch sdpa, dense", shape, 0.0, [sdpa], flops, "TFLOP/s")
                if sweep and query_lens[-1] in (1024, 449):
                    for tile in tiles:
                        config = attention.PrefillConfig(*tile)
                        tiled = [functools.partial(call, prefill_config=config) for call in calls]
                        report(f"  prefill {tile}", shape, error, tiled, flops, "TFLOP/s")

            guarded("prefill", shape, work)


# ------------------------------------------------------------------------------------- the rest


def bench_small(_: bool) -> None:
    for model, t in itertools.product(MODELS, (1, 64, 8192)):
        shape = f"{model} T={t}"
        guarded("small", shape, functools.partial(small_case, shape, t, *MODELS[model]))


def small_case(
    shape: str, t: int, hidden: int, num_heads: int, kv_heads: int, head_dim: int, inter: int,
    vocab: int,
) -> None:  # fmt: skip
    sets = min(rotations(4 * t * hidden), 8)
    norm, residual = randn(hidden), randn(t, hidden)
    xs = [randn(t, hidden) for _ in range(sets)]
    copy = residual.clone()
    out, summed = poisoned(lambda: gpu.rms_norm(xs[0], norm, 1e-5, residual=copy))
    want, want_sum = reference.rms_norm(xs[0], norm, 1e-5, residual=residual)
    error = max(error_of(out, want), error_of(summed, want_sum))
    calls: list[Call] = [
        functools.partial(gpu.rms_norm, x, norm, 1e-5, residual=residual) for x in xs
    ]
    report("rms_norm + residual", shape, error, calls, 8.0 * t * hidden)

    gates = [randn(t, 2 * inter) for _ in range(min(sets, 4))]
    calls = [functools.partial(gpu.gated_activation, gate, "silu") for gate in gates]
    error = error_of(poisoned(calls[0]), reference.gated_activation(gates[0], "silu"))
    report("gated_activation", shape, error, calls, 6.0 * t * inter)

    table = randn(vocab, hidden)
    ids = torch.randint(0, vocab, (t,), device="cuda").to(torch.int32)
    calls = [functools.partial(gpu.embedding, ids, table)]
    error = error_of(poisoned(calls[0]), reference.embedding(ids, table))
    report("embedding", shape, error, calls, 4.0 * t * hidden)

    width = (num_heads + 2 * kv_heads) * head_dim
    qkvs = [randn(t, width) for _ in range(sets)]
    blocks = -(-t // BLOCK_SIZE) + 1
    where = (
        torch.randint(0, 8192, (t,), device="cuda").to(torch.int32),
        torch.rand(8192, head_dim, device="cuda"),
        torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:t].to(torch.int32),
    )
    heads = {"num_heads": num_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    caches = [randn(blocks, kv_heads, BLOCK_SIZE, head_dim) for _ in range(2)]
    others = [cache.clone() for cache in caches]
    calls = [
        functools.partial(gpu.qk_norm_rope_store_kv, qkv, *where, *caches, **heads) for qkv in qkvs
    ]
    outs = (poisoned(calls[0]), *caches)
    wants = (reference.qk_norm_rope_store_kv(qkvs[0], *where, *others, **heads), *others)
    error = max(error_of(out, want) for out, want in zip(outs, wants, strict=True))
    report("qk_norm_rope_store_kv", shape, error, calls, 4.0 * t * width)


def bench_sample(_: bool) -> None:
    settings = {
        "greedy": (0.0, 0, 1.0),
        "temperature": (0.8, 0, 1.0),
        "top_k 50": (0.8, 50, 1.0),
        "top_p 0.9": (0.8, 0, 0.9),
        "top_k 20 top_p 0.95": (0.8, 20, 0.95),
        "flat top_p 0.9": (2.0, 0, 0.9),
    }
    for vocab, count in itertools.product((49152, 128256), (1, 64, 256)):
        logits = randn(count, vocab, dtype=torch.float32) * 3
        for label, setting in settings.items():
            shape = f"V={vocab} S={count} {label}"
            guarded("sample", shape, functools.partial(sample_case, shape, logits, *setting))
        report(
            "  torch argmax",
            f"V={vocab} S={count}",
            0.0,
            [functools.partial(torch.argmax, logits, -1)],
            4.0 * count * vocab,
        )


def sample_case(
    shape: str, logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    """The error is the share of rows whose id a sort says was not to be kept."""
    count, vocab = logits.shape

    records = SlotRecords(count)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for slot in range(count):
        records.write(
            slot,
            RequestState(
                request_id=slot,
                params=params,
                prompt_token_ids=[0],
                max_tokens=1,
                arrival_s=0.0,
                seed=slot,
            ),
        )
    state = gpu.SamplingState(torch.tensor(records.rows, device="cuda"))
    slots = int32(range(count))
    ids = poisoned(lambda: gpu.sample(logits, slots, state)).long()
    # Greedy rows keep one token; ranks and masses come from a sort.
    kept = 1 if temperature == 0 else (top_k or vocab)
    ordered, order = (logits / (temperature or 1.0)).softmax(-1).sort(-1, descending=True)
    rank = (order == ids[:, None]).int().argmax(-1)
    mass = ordered / ordered[:, :kept].sum(-1, keepdim=True)
    before = (mass.cumsum(-1) - mass).gather(-1, rank[:, None])[:, 0]
    wrong = (rank >= kept) | (before > top_p + 1e-5)
    call = functools.partial(gpu.sample, logits, slots, state)
    report("sample", shape, wrong.float().mean().item(), [call], 4.0 * count * vocab)


BENCHES: dict[str, Callable[[bool], None]] = {
    "small": bench_small,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "sample": bench_sample,
    "linear": bench_linear,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHES), help="comma-separated: %(default)s")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated: %(default)s")
    parser.add_argument("--sweep", action="store_true", help="also time alternative tiles")
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    for model in set(MODELS) - set(args.models.split(",")):
        del MODELS[model]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    gpu.set_pdl(args.pdl)
    measure_ceilings()
    for name in args.only.split(","):
        begin = time.perf_counter()
        BENCHES[name](args.sweep)
        torch.cuda.empty_cache()
        print(f"--- {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if args.json:
        found = {"device": torch.cuda.get_device_name(), "ceilings": ceilings, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    wrong = [r for r in rows if "failure" in r or not r.get("error", 0.0) < MAX_ERROR]
    for row in wrong:
        print("WRONG", row)
    print(f"{len(rows)} rows, {len(wrong)} wrong, {time.perf_counter() - started:.0f} s in total")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
