"""KV caches of a byte an element on a GPU against the reference, and against floats.

As in test_gpu: interpreted without a GPU, where float16 stands in for bfloat16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.kernels import reference  # noqa: E402
from octavo.kernels.kv_cache import (  # noqa: E402
    LARGEST,
    bytes_per_row,
    make_cache,
    read_blocks,
    scales_of,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# Of attention over random keys and values against floats: half a unit in the last place of three,
# two and seven bits, over what softmax averages. The interpreter cuts
# towards zero where a GPU rounds.
CUT = 1 if torch.cuda.is_available() else 2.2
ERROR = {
    torch.float8_e4m3fn: 0.04 * CUT,
    torch.float8_e5m2: 0.08 * CUT,
    torch.int8: 0.02,
}
BLOCK = 16
CASES = [(4, 2, 64), (6, 2, 80), (2, 1, 128)]  # query heads, KV heads, elements of a head


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(HALF)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def caches(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    made = [make_cache((blocks, kv_heads, BLOCK, head_dim), dtype, DEVICE) for _ in range(2)]
    for cache in made:
        cache.untyped_storage().fill_(0)
    return made


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    assert out.shape == want.shape
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), CASES)
def test_rows_are_stored_with_their_scales_and_read(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """A prompt of one request and decodes of two, one of them padding."""
    torch.manual_seed(0)
    lengths, queries = [21, 34, 0], [1, 5, 1]
    table = torch.arange(9, dtype=torch.int32, device=DEVICE).view(3, 3)
    stored = {name: caches(10, kv_heads, head_dim, kind) for name, kind in
              (("gpu", dtype), ("reference", dtype), ("float", torch.float32))}  # fmt: skip
    cos_sin = torch.rand(64, head_dim, device=DEVICE)
    options: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}

    def store(requests: list[int], begins: list[int], ends: list[int]) -> dict[str, torch.Tensor]:
        positions = [p for b, e in zip(begins, ends, strict=True) for p in range(b, e)]
        of = [r for r, b, e in zip(requests, begins, ends, strict=True) for _ in range(b, e)]
        mapping = [int(table[r, p // BLOCK]) * BLOCK + p % BLOCK for r, p in zip(of, positions, strict=True)]  # fmt: skip
        qkv = randn(len(positions) + 1, (heads + 2 * kv_heads) * head_dim)
        qkv[0, -head_dim:] = 0
        where = (int32([*positions, 0]), cos_sin, int32([*mapping, -1]))
        return {
            name: (gpu if name == "gpu" else reference).qk_norm_rope_store_kv(
                qkv, *where, *stored[name], **options
            )
            for name in stored
        }

    store([0, 1], [0, 0], lengths[:2])
    for pair in range(2):
        ours, theirs = stored["gpu"][pair], stored["reference"][pair]
        torch.testing.assert_close(scales_of(ours)[:9], scales_of(theirs)[:9], rtol=2e-3, atol=0)
        blocks = torch.arange(9, device=DEVICE)
        exact = read_blocks(stored["float"][pair], blocks)
        assert error_of(read_blocks(ours, blocks), exact) < ERROR[dtype]
        assert not read_blocks(ours, torch.tensor([9], device=DEVICE)).any()
    # The newest rows of all requests once more, as a step of a decode and a chunk stores them.
    store([0, 1], [20, 29], [21, 34])
    starts = int32([0, 1, 6, 7])
    q = randn(7, heads, head_dim)

    def attend(ops: Any, name: str) -> torch.Tensor:
        return ops.paged_attention(
            q, *stored[name], table, int32([0, 1, 2]), int32(lengths), starts,
            scale=head_dim**-0.5, num_decodes=1, max_query_len=5, max_seq_len=64,
        )[:6]  # fmt: skip

    assert queries == (starts[1:] - starts[:-1]).tolist()
    out = attend(gpu, "gpu")
    assert error_of(out, attend(reference, "gpu")) < 4e-3
    assert error_of(out, attend(reference, "float")) < ERROR[dtype]
    decodes = gpu.paged_attention(
        q[:3], *stored["gpu"], table, int32([0, 1, 2]), int32(lengths), int32([0, 1, 2, 3]),
        scale=head_dim**-0.5, num_decodes=3, max_query_len=1, max_seq_len=64,
    )  # fmt: skip
    assert error_of(decodes[0], out[0]) < 4e-3
    assert not decodes[2].any()


def test_static_scales_take_the_place_of_each_rows() -> None:
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 6, 2, 80
    scales = torch.tensor([[0.01, 0.02], [0.03, 0.004]], device=DEVICE)
    ours, theirs = (caches(2, kv_heads, head_dim, torch.float8_e4m3fn) for _ in range(2))
    qkv = randn(20, (heads + 2 * kv_heads) * head_dim)
    positions = int32(list(range(20)))
    slots = int32([*range(18), -1, -1])
    for ops, pair in ((gpu, ours), (reference, theirs)):
        ops.qk_norm_rope_store_kv(
            qkv, positions, torch.rand(64, head_dim, device=DEVICE), slots, *pair,
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, kv_scales=scales,
        )  # fmt: skip
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(scales_of(found), scales_of(wanted))
        assert scales_of(found)[1, 0, 1] > 0
        assert scales_of(found)[1, 0, 2] == 0
    blocks = torch.arange(2, device=DEVICE)
    # The smallest of these scales cuts off.
    assert error_of(read_blocks(ours[1], blocks), read_blocks(theirs[1], blocks)) < 0.04 * CUT


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("reqs", [2, 5])
def test_the_newest_row_is_read_as_later_steps_read_it(reqs: int, dtype: torch.dtype) -> None:
    """Rotation, store and attention in one kernel against two."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 4, 2, 64
    lengths = [19, 1, 33, 0, 16][:reqs]
    table = torch.arange(3 * reqs, dtype=torch.int32, device=DEVICE).view(reqs, 3)
    one, two = (caches(3 * reqs, kv_heads, head_dim, dtype) for _ in range(2))
    positions = [max(length - 1, 0) for length in lengths]
    mapping = [
        int(table[r, p // BLOCK]) * BLOCK + p % BLOCK if lengths[r] else -1
        for r, p in enumerate(positions)
    ]
    for a, b in zip(one, two, strict=True):
        rows = torch.randn(3 * reqs, kv_heads, head_dim, device=DEVICE)
        for offset in range(BLOCK):
            where = torch.full((3 * reqs,), offset, device=DEVICE)
            reference.store_rows(a, torch.arange(3 * reqs, device=DEVICE), where, rows + offset)
        b.untyped_storage().copy_(a.untyped_storage())
    qkv = randn(reqs, (heads + 2 * kv_heads) * head_dim)
    cos_sin = torch.rand(64, head_dim, device=DEVICE)
    slots, lens = int32(list(range(reqs))), int32(lengths)
    fused = gpu.rope_decode_attention(
        qkv, cos_sin, int32(mapping), *one, table, slots, lens, num_heads=heads, scale=0.125
    )
    q = gpu.qk_norm_rope_store_kv(
        qkv, int32(positions), cos_sin, int32(mapping), *two,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    apart = gpu.paged_attention(
        q, *two, table, slots, lens, int32(list(range(reqs + 1))), scale=0.125,
        num_decodes=reqs, max_query_len=1, max_seq_len=64,
    )  # fmt: skip
    assert error_of(fused, apart) < 4e-3
    blocks = torch.arange(3 * reqs, device=DEVICE)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(read_blocks(a, blocks), read_blocks(b, blocks))


def test_memory_of_rows() -> None:
    assert bytes_per_row(128, torch.bfloat16) == 256
    assert bytes_per_row(128, torch.int8) == 132
    cache = make_cache((3, 2, BLOCK, 64), torch.float8_e4m3fn, DEVICE)
    assert cache.untyped_storage().nbytes() == 3 * 2 * BLOCK * 68
    with pytest.raises(ValueError, match="is a multiple of 4, not 63"):
        make_cache((3, 2, 1, 63), torch.int8, DEVICE)
    other = make_cache((3, 2, BLOCK, 64), torch.int8, DEVICE)
    with pytest.raises(ValueError, match=r"v_cache is torch\.int8"):
        gpu.paged_attention(
            randn(1, 4, 64), cache, other, int32([0]).view(1, 1), int32([0]), int32([1]),
            int32([0, 1]), scale=1.0, num_decodes=1, max_query_len=1, max_seq_len=1,
        )  # fmt: skip
