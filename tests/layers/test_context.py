"""StepContext in chunks: what each piece of a request sees."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.layers.context import StepContext

CHUNK, BLOCK = 8, 4


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def step(query_lens: list[int], seq_lens: list[int], num_decodes: int) -> StepContext:
    """Requests whose blocks lie in reverse, 16 of them each; those without tokens are padding."""
    starts = [sum(query_lens[:r]) for r in range(len(query_lens) + 1)]
    table = torch.arange(16 * len(seq_lens), dtype=torch.int32).flip(0).view(-1, 16)
    return StepContext(
        positions=ints(*range(starts[-1])),
        slot_mapping=ints(*range(starts[-1])),
        slots=ints(*range(len(seq_lens))),
        seq_lens=ints(*seq_lens),
        query_start_loc=ints(*starts),
        block_table=table,
        num_reqs=len(seq_lens),
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: StepContext) -> Tensor:
    return reference.paged_attention(
        q,
        k,
        v,
        ctx.block_table,
        ctx.slots,
        ctx.seq_lens,
        ctx.query_start_loc,
        scale=1.0,
        num_decodes=ctx.num_decodes,
        max_query_len=ctx.max_query_len,
        max_seq_len=ctx.max_seq_len,
    )


def attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, ctx: StepContext) -> Tensor:
    """Each query by itself, over its chunk's tokens up to its own."""
    out = torch.zeros(len(q), 2 * 4)
    for r, seq_len in enumerate(ctx.seq_lens.tolist()):
        first, end = ctx.query_start_loc[r : r + 2].tolist()
        keys, values = (
            c[ctx.block_table[r].long()].transpose(1, 2).reshape(-1, 2, 4) for c in (k, v)
        )
        for row in range(first, end) if seq_len else ():
            last = seq_len - end + row
            seen = slice(last // CHUNK * CHUNK, last + 1)
            scores = torch.einsum("hd,khd->hk", q[row], keys[seen]).softmax(-1)
            out[row] = torch.einsum("hk,khd->hd", scores, values[seen]).flatten()
    return out


def test_queries_see_their_own_chunk() -> None:
    torch.manual_seed(0)
    # Decodes at a chunk's first, last and middle token, padding, then prefills: within a chunk, from
    # the middle of one to the middle of the next but one, whole chunks, and one more.
    ctx = step([1, 1, 1, 1, 3, 15, 16, 17], [9, 16, 13, 0, 7, 20, 16, 17], 4)
    blocks = ctx.block_table.numel()
    k, v = torch.randn(2, blocks, 2, BLOCK, 4)
    q = torch.randn(55, 2, 4)
    found = attend(q, k, v, ctx.in_chunks(CHUNK, BLOCK))
    expected = attend_one_by_one(q, k, v, ctx)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_decodes_stay_one_request_each() -> None:
    ctx = step([1, 1], [9, 32], 2).in_chunks(CHUNK, BLOCK)
    assert (ctx.num_reqs, ctx.num_decodes) == (2, 2)
    assert ctx.seq_lens.tolist() == [1, 8]
    assert ctx.block_table.shape == (2, CHUNK // BLOCK)
