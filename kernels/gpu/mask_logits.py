"""mask_logits: only the tokens that a row's mask allows, in place, before a token is chosen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_shape, check_tensors, pdl_options

MASK_BLOCK = 4096  # logits a program: 16 KB of float32


@triton.jit
def mask_kernel(
    logits,  # [S, V]
    rows,  # [M]: the row that each mask is of; below 0: of none
    masks,  # [M, W]: a bit a token
    V,
    W,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows + m).to(tl.int64)
    if row >= 0:
        word = tl.load(masks + m * W + cols // 32, mask=cols < V, other=-1)
        banned = ((word >> (cols % 32)) & 1) == 0
        banned_logit = tl.full([BLOCK], float("-inf"), logits.dtype.element_ty)
        tl.store(logits + row * V + cols, banned_logit, mask=(cols < V) & banned)


def mask_logits(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Make logits [S, V] of tokens that a mask does not hold -inf, in place.

    Args:
        rows: int32 [M], distinct: the row that each mask is of, below 0 for none.
        masks: int32 [M, ceil(V / 32)]: token i is bit i % 32 of word i // 32.

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(logits=logits, rows=rows, masks=masks)
    vocab = logits.shape[1]
    check_shape("masks", masks, rows.shape[0], cdiv(vocab, 32))
    if not rows.shape[0]:
        return
    mask_kernel[(rows.shape[0], cdiv(vocab, MASK_BLOCK))](
        logits,
        rows,
        masks,
        V=vocab,
        W=masks.shape[1],
        BLOCK=MASK_BLOCK,
        num_warps=8,
        num_stages=1,
        **pdl_options(),
    )
