"""Caches of a byte an element in the CPU kernels against reference.py, at this process's level.

What no token was stored in is NaN, or large. The same file runs at the other levels in child
processes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from levels import OTHER_LEVELS, run_at_level
from octavo.kernels import reference
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.kv_cache import LARGEST, make_cache, read_blocks, scales_of, store_rows

# Of the largest magnitude: queries and probabilities may be rounded to bfloat16.
ATTENTION_ERROR = 1e-2


def caches(blocks: int, kv_heads: int, block_size: int, dim: int, dtype: Any) -> list[torch.Tensor]:
    made = [
        make_cache((blocks, kv_heads, block_size, dim), dtype, torch.device("cpu")) for _ in "kv"
    ]
    for cache in made:
        cache.untyped_storage().fill_(0x7F)
    return made


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rot"),
    [(9, 3, 64, 64), (4, 4, 40, 40), (8, 1, 80, 32), (4, 2, 128, 64), (1, 1, 8, 6), (2, 2, 4, 2)],
)
def test_rows_are_stored_as_the_reference_stores_them(
    heads: int, kv_heads: int, dim: int, rot: int, is_static: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    cos_sin = torch.rand(64, rot)
    scales = torch.rand(2, kv_heads) * 0.2 * 127 / LARGEST[dtype] if is_static else None
    for tokens, block_size in [(0, 1), (1, 3), (5, 1), (70, 16)]:
        num_blocks = 100 // block_size + 1
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim) * torch.rand(tokens, 1) * 20
        qkv[2:3] = 0
        slots = torch.randperm(100, dtype=torch.int32)[:tokens]
        slots[3::4] = -1
        where = torch.randint(0, 64, (tokens,), dtype=torch.int32), cos_sin, slots
        found, wanted = (caches(num_blocks, kv_heads, block_size, dim, dtype) for _ in "ab")
        options: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim,
                                   "k_norm": torch.rand(dim), "kv_scales": scales}  # fmt: skip
        q = cpu.qk_norm_rope_store_kv(qkv, *where, *found, **options)
        torch.testing.assert_close(
            q, reference.qk_norm_rope_store_kv(qkv, *where, *wanted, **options)
        )
        stored = slots[slots >= 0].long()
        block, offset = stored // block_size, stored % block_size
        untouched = torch.ones(num_blocks, block_size, dtype=torch.bool)
        untouched[block, offset] = False
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                scales_of(ours)[block, :, offset], scales_of(theirs)[block, :, offset]
            )
            a, b = (c.view(torch.uint8)[block, :, offset] for c in (ours, theirs))
            # A sum that is rounded in another order may fall to the other side of a tie.
            assert not tokens or (a == b).float().mean() > 0.98
            a, b = (
                read_blocks(c, torch.arange(num_blocks))[block, :, offset] for c in (ours, theirs)
            )
            least = float(a.abs().max()) / 100 if tokens else 0
            torch.testing.assert_close(a, b, rtol=0.26, atol=least)
            rows = ours.view(torch.uint8).transpose(1, 2)
            assert (rows[untouched] == 0x7F).all()


def check(
    seq_lens: list[int],
    query_lens: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Attention of requests in shuffled blocks, each of which some tokens are stored in."""
    need = [-(-n // block_size) for n in seq_lens]
    order = torch.randperm(sum(need) + 2).tolist()
    table = torch.full((len(need), max(need)), -5, dtype=torch.int32)
    pair = caches(len(order), kv_heads, block_size, dim, dtype)
    for r, length in enumerate(seq_lens):
        table[r, : need[r]] = int32([order.pop() for _ in range(need[r])])
        at = torch.arange(length)
        blocks = table[r].long()[at // block_size]
        for cache in pair:
            rows = torch.randn(length, kv_heads, dim) * (0.1 + torch.rand(length, kv_heads, 1))
            store_rows(cache, blocks, at % block_size, rows)
    starts = int32([0, *itertools.accumulate(query_lens)])
    q = torch.randn(int(starts[-1]), heads, dim)
    args = (q, *pair, table, torch.arange(len(need), dtype=torch.int32), int32(seq_lens), starts)
    hints = {"scale": dim**-0.5, "num_decodes": sum(n == 1 for n in query_lens),
             "max_query_len": max(query_lens), "max_seq_len": max(seq_lens), **options}  # fmt: skip
    found, wanted = cpu.paged_attention(*args, **hints), reference.paged_attention(*args, **hints)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < ATTENTION_ERROR


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("dim", [4, 40, 64, 80, 96, 128, 256])
def test_attention_shapes(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for heads, kv_heads, block_size in [(9, 3, 16), (4, 4, 3), (8, 1, 1), (10, 2, 16)]:
        check([1, 70, 5, 130, 67], [1, 1, 5, 64, 3], heads, kv_heads, dim, block_size, dtype)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 7},
        {"softcap": 30.0, "sliding_window": 65},
        {"causal": False, "sliding_window": 20},
        {"sinks": torch.tensor([-3.0, 0.0, 1.0, 5.0, 300.0, -300.0])},
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.01, 0.0])},
    ],
)
def test_attention_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check([150, 131, 64, 20], [1, 131, 40, 2], 6, 2, 64, 16, dtype, **options)


@pytest.mark.parametrize("dtype", LARGEST)
def test_attention_long_and_odd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check([2000, 513, 512, 1030], [1, 1, 1, 1], 6, 2, 64, 16, dtype)
    check([2000, 1030], [1, 1], 6, 1, 576, 16, dtype)
    check([1300], [1], 4, 2, 40, 3, dtype, sliding_window=1100)
    check([700], [300], 32, 8, 64, 16, dtype)
    check([90], [90], 64, 1, 16, 8, dtype)


@pytest.mark.parametrize("dtype", LARGEST)
def test_latent_rows(dtype: torch.dtype) -> None:
    """One row for all heads, keys and values in one."""
    torch.manual_seed(0)
    (cache, _) = caches(6, 1, 16, 96, dtype)
    for ops, rows in ((cpu, slice(0, 10)), (reference, slice(10, 40))):
        stored = torch.randn(40, 96)
        ops.store_latent(stored[rows], torch.arange(40, dtype=torch.int32)[rows], cache)
    args = (torch.randn(3, 4, 96), cache, torch.arange(3, dtype=torch.int32)[None], int32([0]),
            int32([40]), int32([0, 3]))  # fmt: skip
    hints = {"scale": 0.1, "value_dim": 64, "num_decodes": 0, "max_query_len": 3, "max_seq_len": 40}
    found, wanted = cpu.latent_attention(*args, **hints), reference.latent_attention(*args, **hints)
    assert wanted.abs().max() > 0.05
    assert float((found - wanted).abs().max() / wanted.abs().max()) < ATTENTION_ERROR


def test_what_does_not_fit_is_refused() -> None:
    dim, slots = 8, int32([0, 1])
    pair = caches(2, 1, 4, dim, torch.int8)

    def store(**change: Any) -> None:
        args: dict[str, Any] = {"k_cache": pair[0], "v_cache": pair[1], "kv_scales": None, **change}
        cpu.qk_norm_rope_store_kv(
            torch.randn(2, 24), slots, torch.rand(5, dim), slots,
            num_heads=1, num_kv_heads=1, head_dim=dim, **args,
        )  # fmt: skip

    store()
    plain = torch.zeros(2, 1, 4, dim, dtype=torch.int8)
    for change, message in [
        ({"v_cache": plain}, "v_cache must be like"),
        ({"k_cache": plain, "v_cache": plain}, "rows with scales"),
        ({"kv_scales": torch.rand(2, 2)}, "kv_scales must be"),
        ({"kv_scales": torch.rand(1, 1)}, "kv_scales must be"),
        ({"kv_scales": torch.rand(2, 1).double()}, "kv_scales must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            store(**change)


@pytest.mark.slow
@pytest.mark.parametrize("level", OTHER_LEVELS)
def test_whole_file_at_level(level: str) -> None:
    run = run_at_level(__file__, level)
    assert run.returncode == 0, run.stdout[-3000:]
