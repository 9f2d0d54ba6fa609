"""adjust_logits: bias, allowed ids and penalties, in place, before a token is chosen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import slots as columns
from .launch import cdiv, pdl_options
from .slots import SamplingState, load_column

BIAS_BLOCK = 32  # biased ids a program
ADJUST_BLOCK = 4096  # logits a program: 16 KB of float32

# token_counts: how often an id was generated, and a bit, set by the caller, for the prompt's ids.
MAX_COUNT = 0x3FFF
IN_PROMPT = 0x4000

COUNT_MASK = tl.constexpr(MAX_COUNT)
OUTPUT_POSITION = tl.constexpr(columns.OUTPUT_POSITION)
REPETITION_PENALTY = tl.constexpr(columns.REPETITION_PENALTY)
PRESENCE_PENALTY = tl.constexpr(columns.PRESENCE_PENALTY)
FREQUENCY_PENALTY = tl.constexpr(columns.FREQUENCY_PENALTY)


@triton.jit
def bias_kernel(
    logits,  # [S, V]
    slots,  # [S]
    slot_table,  # [N, RECORD_LEN]
    bias_ids,  # [N, B]
    bias_values,
    bias_until,
    B,
    V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    position = load_column(slot_table, slot, OUTPUT_POSITION)
    ids = tl.load(bias_ids + slot * B + b, mask=b < B, other=-1)
    until = tl.load(bias_until + slot * B + b, mask=b < B, other=0)
    value = tl.load(bias_values + slot * B + b, mask=b < B, other=0.0)
    active = (ids >= 0) & (ids < V) & (position < until)
    at = logits + row * V + ids
    old = tl.load(at, mask=active, other=0.0).to(tl.float32)
    tl.store(at, (old + value).to(logits.dtype.element_ty), mask=active)


@triton.jit
def penalize(
    z,  # [BLOCK] float32
    cols,  # [BLOCK]
    slot_table,
    token_counts,  # [N, V] int16
    slot,
    V,
    BLOCK: tl.constexpr,
):
    """Logits ``cols`` of one row after the repetition, frequency and presence penalties."""
    repetition = load_column(slot_table, slot, REPETITION_PENALTY)
    presence = load_column(slot_table, slot, PRESENCE_PENALTY)
    frequency = load_column(slot_table, slot, FREQUENCY_PENALTY)
    # A slot without penalties reads no counts. Compared as a tile: the interpreter's masks
    # cannot be joined with a scalar.
    strength = tl.abs(repetition - 1.0) + tl.abs(presence) + tl.abs(frequency)
    used = (cols < V) & (tl.zeros([BLOCK], dtype=tl.float32) < strength)
    counts = tl.load(token_counts + slot * V + cols, mask=used, other=0).to(tl.int32)
    generated = counts & COUNT_MASK
    z = tl.where(counts > 0, tl.where(z > 0.0, z / repetition, z * repetition), z)
    z -= generated.to(tl.float32) * frequency
    z -= tl.where(generated > 0, presence, 0.0)
    return z


@triton.jit
def adjust_kernel(
    logits,  # [S, V]
    slots,  # [S]
    slot_table,  # [N, RECORD_LEN]
    token_counts,  # [N, V] int16; None: no penalties
    allowed_mask,  # [N, ceil(V / 32)] int32; None: all ids are allowed
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < V
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row).to(tl.int64)
    z = tl.load(logits + row * V + cols, mask=mask, other=0.0).to(tl.float32)
    if allowed_mask is not None:
        words = allowed_mask + slot * ((V + 31) // 32)
        word = tl.load(words + cols // 32, mask=mask, other=0)
        z = tl.where(((word >> (cols % 32)) & 1) != 0, z, float("-inf"))
    if token_counts is not None:
        z = penalize(z, cols, slot_table, token_counts, slot, V, BLOCK)
    tl.store(logits + row * V + cols, z.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def count_token(token_counts, slot, token, V: tl.constexpr):
    """Counts a token that was sampled in ``slot``; a count stops at MAX_COUNT."""
    counter = token_counts + slot * V + token
    old = tl.load(counter).to(tl.int32)
    tl.store(counter, tl.where((old & COUNT_MASK) < COUNT_MASK, old + 1, old).to(tl.int16))


def adjust_logits(logits: torch.Tensor, slots: torch.Tensor, state: SamplingState) -> None:
    """Apply bias, then allowed ids, then penalties to logits [S, V] in place, as the state has.

    Raises:
        ValueError: only some of the three bias tensors are there.
    """
    rows, vocab = logits.shape
    bias = (state.bias_ids, state.bias_values, state.bias_until)
    if bias[0] is not None and bias[1] is not None and bias[2] is not None:
        width = bias[0].shape[1]
        bias_kernel[(rows, cdiv(width, BIAS_BLOCK))](
            logits,
            slots,
            state.slot_table,
            *bias,
            width,
            V=vocab,
            BLOCK_B=BIAS_BLOCK,
            num_warps=1,
            num_stages=1,
            **pdl_options(),
        )
    elif any(tensor is not None for tensor in bias):
        raise ValueError("bias_ids, bias_values and bias_until come together")
    if state.token_counts is not None or state.allowed_mask is not None:
        adjust_kernel[(rows, cdiv(vocab, ADJUST_BLOCK))](
            logits,
            slots,
            state.slot_table,
            state.token_counts,
            state.allowed_mask,
            V=vocab,
            BLOCK=ADJUST_BLOCK,
            num_warps=8,
            num_stages=1,
            **pdl_options(),
        )
