"""Latent attention's Triton kernels against the reference; see test_gpu.py."""

from __future__ import annotations

import itertools

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def check(
    dtype: torch.dtype,
    num_heads: int,
    rope_dim: int,
    latent_dim: int,
    query_lens: list[int],
    contexts: list[int],
    block_size: int = 4,
) -> None:
    """Rows past each request's end are NaN: reading one shows."""
    torch.manual_seed(0)
    width, num_reqs = rope_dim + latent_dim, len(query_lens)
    seq_lens = [q + c for q, c in zip(query_lens, contexts, strict=True)]
    per_req = max(-(-length // block_size) for length in seq_lens) + 1
    table = torch.randperm(num_reqs * per_req).to(torch.int32).view(num_reqs, per_req)
    cache = torch.full((num_reqs * per_req, 1, block_size, width), float("nan"), dtype=dtype)
    rows = torch.randn(sum(seq_lens), width).to(dtype)
    mapping = [
        int(table[r, p // block_size]) * block_size + p % block_size
        for r, length in enumerate(seq_lens)
        for p in range(length)
    ]
    slots = torch.arange(num_reqs, dtype=torch.int32)
    starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    # A row that belongs to no slot is stored nowhere.
    rows = torch.cat([rows, torch.zeros(1, width, dtype=dtype)])
    where = torch.tensor([*mapping, -1], dtype=torch.int32)
    q = torch.randn(sum(query_lens), num_heads, width).to(dtype)
    cache, q, rows, where, table, slots, lens, starts = (
        t.to(DEVICE) for t in (cache, q, rows, where, table, slots, lens, starts)
    )
    want_cache = cache.clone()
    reference.store_latent(rows, where, want_cache)
    gpu.store_latent(rows, where, cache)
    torch.testing.assert_close(cache, want_cache, equal_nan=True)
    options = {
        "scale": width**-0.5,
        "value_dim": latent_dim,
        "num_decodes": 0,
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
    }
    args = (q, cache, table, slots, lens, starts)
    want = reference.latent_attention(q, cache.nan_to_num(), *args[2:], **options)
    out = gpu.latent_attention(*args, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_latent_attention(dtype: torch.dtype) -> None:
    check(dtype, 3, 8, 24, [1, 1, 1], [0, 40, 7])
    check(dtype, 20, 16, 32, [1, 5, 37], [9, 0, 30], block_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_latent_attention_of_many_tokens(dtype: torch.dtype) -> None:
    check(dtype, 2, 8, 16, [70, 1], [3, 20], block_size=16)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_latent_attention_real(dtype: torch.dtype, num_heads: int) -> None:
    check(dtype, num_heads, 64, 512, [1] * 8, [0, 1000, 17, 4, 513, 64, 15, 100], block_size=16)
    check(dtype, num_heads, 64, 512, [1, 300, 77], [900, 0, 64], block_size=16)
