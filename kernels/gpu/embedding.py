"""embedding: rows of a table, gathered and scaled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_tensors, pdl_options

BLOCK = 1024


@triton.jit
def embedding_kernel(
    ids,  # [T] int32
    table,  # [V, D]
    y,  # [T, D]
    D,
    V,
    scale,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    if PDL:
        # In this order, unlike elsewhere: whatever starts from here on finds the step's lengths and
        # positions complete, and reads them without waiting.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(ids + row).to(tl.int64)
    # An id outside the table (a padded row's leftover) reads zeros, never foreign memory.
    # As a tile: the interpreter's masks cannot be joined with a scalar.
    row_of = token + tl.zeros([BLOCK_D], dtype=tl.int64)
    known = mask & (row_of >= 0) & (row_of < V)
    value = tl.load(table + token * D + cols, mask=known, other=0.0).to(tl.float32) * scale
    tl.store(y + row * D + cols, value.to(y.dtype.element_ty), mask=mask)


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """weight[ids] * scale: ids [T] int32, weight [V, D] -> [T, D] in out_dtype or the weight's.

    Ids outside the table give rows of zeros.
    """
    check_tensors(ids=ids, weight=weight)
    rows, (vocab, hidden) = ids.numel(), weight.shape
    y = torch.empty((rows, hidden), dtype=out_dtype or weight.dtype, device=weight.device)
    if rows:
        embedding_kernel[(rows, cdiv(hidden, BLOCK))](
            ids,
            weight,
            y,
            hidden,
            vocab,
            scale,
            BLOCK_D=BLOCK,
            num_warps=4,
            num_stages=1,
            **pdl_options(),
        )
    return y
