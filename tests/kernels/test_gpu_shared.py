"""Attention over leading blocks that requests share: each as if it attended alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tests.kernels.test_gpu import DEVICE, DTYPES, assert_close, int32, randn

from octavo.kernels import reference
from octavo.kernels.gpu import ops as gpu
from octavo.kernels.shared_prefixes import MAX_GROUPS, SharedPrefixes

shared_module = importlib.import_module("octavo.kernels.gpu.shared_attention")


def plan(groups: list[tuple[list[int], int]], num_reqs: int, block_size: int) -> Any:
    """SharedPrefixes of groups (rows, shared blocks)."""
    fields, members = [], []
    tokens = [0] * num_reqs
    for rows, blocks in groups:
        fields.append([len(members), len(rows), blocks * block_size])
        members += rows
        for row in rows:
            tokens[row] = blocks * block_size
    fields += [[0, 0, 0]] * (MAX_GROUPS - len(fields))
    members += [0] * (num_reqs - len(members))
    return SharedPrefixes(int32(fields), int32(members), int32(tokens))


def check_shared(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    seq_lens: list[int],
    groups: list[tuple[list[int], int]],
    has_sinks: bool = False,
    has_slopes: bool = False,
    softcap: float = 0.0,
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    num_reqs = len(seq_lens)
    per_req = max(-(-length // block_size) for length in seq_lens) + 1
    num_blocks = num_reqs * per_req + 1
    slots = torch.randperm(num_reqs + 2)[:num_reqs].to(DEVICE, torch.int32)
    table = torch.zeros(num_reqs + 2, per_req, dtype=torch.int32, device=DEVICE)
    blocks = torch.randperm(num_blocks - 1).to(DEVICE, torch.int32)
    table[slots.long()] = blocks.view(num_reqs, per_req)
    for rows, count in groups:
        table[slots[rows].long(), :count] = table[slots[rows[0]].long(), :count].clone()
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    caches = [randn(*shape, dtype=dtype) for _ in range(2)]
    q = randn(num_reqs, num_heads, head_dim, dtype=dtype)
    rest = (table, slots, int32(seq_lens), int32(range(num_reqs + 1)))
    options: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "num_decodes": num_reqs,
        "max_query_len": 1,
        "max_seq_len": max(seq_lens),
        "softcap": softcap,
        "sinks": randn(num_heads) if has_sinks else None,
        "slopes": torch.rand(num_heads, device=DEVICE) / 50 if has_slopes else None,
    }
    want = reference.paged_attention(q, *caches, *rest, **options)
    shared = plan(groups, num_reqs, block_size)
    # A group's other tables' first blocks are not read: what they hold shows.
    for rows, count in groups:
        table[slots[rows[1:]].long(), :count] = num_blocks - 1
    caches[0][num_blocks - 1] = float("nan")
    out = gpu.paged_attention(q, *caches, *rest, **options, shared=shared)
    assert_close(out, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3, 64), (5, 1, 80)])
def test_groups_attend_as_each_alone(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    lens = [101, 0, 640, 97, 333, 98, 12, 700]
    check_shared(dtype, heads, 16, lens, [([0, 3, 5], 6), ([7, 2], 38)])


def test_more_members_than_a_tile_and_nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "MIN_SPLIT", 16)
    lens = [66 + 3 * n for n in range(20)]
    check_shared(torch.float32, (6, 2, 16), 4, lens, [(list(range(0, 20)), 16)])
    check_shared(torch.float32, (6, 2, 16), 4, lens[:4], [])


def test_sinks_slopes_and_a_cap() -> None:
    lens = [70, 81, 66, 5]
    check_shared(torch.float32, (4, 2, 32), 8, lens, [([0, 1, 2], 8)], has_sinks=True)
    check_shared(torch.float32, (4, 2, 32), 8, lens, [([2, 0], 8)], has_slopes=True, softcap=5.0)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 8, 64), (28, 4, 128), (8, 4, 256)])
def test_groups_real(heads: tuple[int, int, int]) -> None:
    lens = [2100 + 7 * n for n in range(40)] + [40 * n for n in range(20)]
    groups = [(list(range(0, 40, 2)), 131), (list(range(1, 40, 2)), 70), ([57, 59], 40)]
    check_shared(torch.bfloat16, heads, 16, lens, groups)
    check_shared(torch.bfloat16, heads, 16, lens, [])
