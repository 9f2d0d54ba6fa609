"""prepare_step: one step's packed plan becomes the fixed buffers a captured graph reads.

The first node of every graph. What changes from step to step (how many tokens, requests, block
updates) is read from a header in memory, so one graph serves every step that fits its shape.

The packed plan, int32, is what one copy brings to the device::

    header   [HEADER_LEN]  num_tokens, num_reqs, num_decodes, num_samples, num_block_updates,
                           num_records, offset of the records behind the header, and which of
                           HostIds' rows the step's ids go to
    plan     the sections of a Staging, unpadded
    records  [num_records, RECORD_LEN]  sampling parameters of requests that just got a slot: slot,
                           temperature, top_k, top_p, min_p, seed (low, high), num_prompt_tokens,
                           repetition, presence and frequency penalty; floats as their bits
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import cdiv, check_tensors, pdl_options

HEADER_LEN = 8
HEADER = struct.Struct("=8i")  # in the order above
HEADER_TURN = 7
RECORD_LEN = 16
BLOCK = 256


@dataclass(frozen=True)
class StepBuffers:
    """The fixed buffers, int32 but for the sampling state; N = number of slots with the spare."""

    input_ids: torch.Tensor  # [max rows]
    positions: torch.Tensor  # [max rows]
    slot_mapping: torch.Tensor  # [max rows]
    slots: torch.Tensor  # [max requests]
    seq_lens: torch.Tensor  # [max requests]
    query_start_loc: torch.Tensor  # [max requests + 1]
    sample_rows: torch.Tensor  # [max requests]
    sample_slots: torch.Tensor  # [max requests]
    block_table: torch.Tensor  # [N, max_blocks_per_seq]
    last_tokens: torch.Tensor  # [N]
    output_positions: torch.Tensor  # [N]
    num_prompt_tokens: torch.Tensor  # [N]
    temperature: torch.Tensor  # [N] float32
    top_k: torch.Tensor  # [N]
    top_p: torch.Tensor  # [N] float32
    min_p: torch.Tensor  # [N] float32
    seeds: torch.Tensor  # [N] int64
    repetition_penalty: torch.Tensor  # [N] float32
    presence_penalty: torch.Tensor  # [N] float32
    frequency_penalty: torch.Tensor  # [N] float32


@triton.jit(do_not_specialize=["decode_rows", "prefill_reqs", "prefill_rows", "spare"])
def prepare_kernel(
    packed,
    input_ids,
    positions,
    slot_mapping,
    slots,
    seq_lens,
    query_start_loc,
    sample_rows,
    sample_slots,
    block_table,
    last_tokens,
    output_positions,
    num_prompt_tokens,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    decode_rows,
    prefill_reqs,
    prefill_rows,
    spare,
    HEADER_LEN: tl.constexpr,
    RECORD_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_tokens = tl.load(packed)
    num_reqs = tl.load(packed + 1)
    num_decodes = tl.load(packed + 2)
    num_samples = tl.load(packed + 3)
    num_updates = tl.load(packed + 4)
    num_records = tl.load(packed + 5)
    plan = packed + HEADER_LEN
    records = plan + tl.load(packed + 6)
    plan_slots = plan + 3 * num_tokens
    plan_seq_lens = plan_slots + num_reqs
    plan_starts = plan_seq_lens + num_reqs
    plan_sample_rows = plan_starts + num_reqs + 1
    plan_sample_slots = plan_sample_rows + num_reqs
    updates = plan_sample_slots + num_reqs

    # --- Token rows: the decodes, padding, the prefilled tokens, padding.
    rows = pid * BLOCK + lanes
    total_rows = decode_rows + prefill_rows
    is_decode = rows < decode_rows
    token = tl.where(is_decode, rows, rows - decode_rows + num_decodes)
    bound = tl.where(is_decode, num_decodes, num_tokens)
    used = (rows < total_rows) & (token < bound)
    ids = tl.load(plan + token, mask=used, other=0)
    # A negative id is still on the device: the last one sampled in the request's slot.
    on_device = used & (ids < 0)
    slot = tl.load(plan_slots + token, mask=on_device, other=0)
    ids = tl.where(on_device, tl.load(last_tokens + slot, mask=on_device, other=0), ids)
    position = tl.load(plan + num_tokens + token, mask=used, other=0)
    mapping = tl.load(plan + 2 * num_tokens + token, mask=used, other=-1)
    in_rows = rows < total_rows
    tl.store(input_ids + rows, ids, mask=in_rows)
    tl.store(positions + rows, position, mask=in_rows)
    tl.store(slot_mapping + rows, mapping, mask=in_rows)

    # --- The block table.
    for start in range(pid * BLOCK, num_updates, tl.num_programs(0) * BLOCK):
        u = start + lanes
        at = tl.load(updates + u, mask=u < num_updates, other=0)
        block = tl.load(updates + num_updates + u, mask=u < num_updates, other=0)
        tl.store(block_table + at, block, mask=u < num_updates)

    if pid == 0:
        # --- Sampling parameters of new requests.
        for start in range(0, num_records, BLOCK):
            n = start + lanes
            known = n < num_records
            record = records + n * RECORD_LEN
            to = tl.load(record, mask=known, other=0)
            value = tl.load(record + 1, mask=known, other=0)
            tl.store(temperature + to, value.to(tl.float32, bitcast=True), mask=known)
            tl.store(top_k + to, tl.load(record + 2, mask=known, other=0), mask=known)
            value = tl.load(record + 3, mask=known, other=0)
            tl.store(top_p + to, value.to(tl.float32, bitcast=True), mask=known)
            value = tl.load(record + 4, mask=known, other=0)
            tl.store(min_p + to, value.to(tl.float32, bitcast=True), mask=known)
            low = tl.load(record + 5, mask=known, other=0).to(tl.int64) & 0xFFFFFFFF
            high = tl.load(record + 6, mask=known, other=0).to(tl.int64) << 32
            tl.store(seeds + to, low | high, mask=known)
            tl.store(num_prompt_tokens + to, tl.load(record + 7, mask=known, other=0), mask=known)
            value = tl.load(record + 8, mask=known, other=0)
            tl.store(repetition_penalty + to, value.to(tl.float32, bitcast=True), mask=known)
            value = tl.load(record + 9, mask=known, other=0)
            tl.store(presence_penalty + to, value.to(tl.float32, bitcast=True), mask=known)
            value = tl.load(record + 10, mask=known, other=0)
            tl.store(frequency_penalty + to, value.to(tl.float32, bitcast=True), mask=known)
        # num_prompt_tokens is read back below, by other threads of this program.
        tl.debug_barrier()
        # --- Requests and samples.
        total_reqs = decode_rows + prefill_reqs
        for start in range(0, total_reqs + 1, BLOCK):
            r = start + lanes
            decodes = r < decode_rows
            req = tl.where(decodes, r, r - decode_rows + num_decodes)
            known = (r < total_reqs) & (req < tl.where(decodes, num_decodes, num_reqs))
            tl.store(
                slots + r,
                tl.load(plan_slots + req, mask=known, other=spare),
                mask=r < total_reqs,
            )
            tl.store(
                seq_lens + r,
                tl.load(plan_seq_lens + req, mask=known, other=0),
                mask=r < total_reqs,
            )
            begin = tl.load(plan_starts + req, mask=known, other=num_tokens)
            begin = tl.where(decodes, r, begin - num_decodes + decode_rows)
            tl.store(query_start_loc + r, begin, mask=r <= total_reqs)
            sampled = (r < num_samples) & (r < total_reqs)
            row = tl.load(plan_sample_rows + r, mask=sampled, other=0)
            to = tl.load(plan_sample_slots + r, mask=sampled, other=spare)
            moved = tl.where(row < num_decodes, row, row - num_decodes + decode_rows)
            tl.store(sample_rows + r, tl.where(sampled, moved, 0), mask=r < total_reqs)
            tl.store(sample_slots + r, to, mask=r < total_reqs)
            # The sample is of the token that follows position.
            position = tl.load(plan + num_tokens + row, mask=sampled, other=0)
            prompt = tl.load(num_prompt_tokens + to, mask=sampled, other=0)
            tl.store(output_positions + to, position + 1 - prompt, mask=sampled)


def prepare_step(
    packed: torch.Tensor,
    buffers: StepBuffers,
    *,
    decode_rows: int,
    prefill_reqs: int,
    prefill_rows: int,
) -> None:
    """Spread a packed plan over the buffers, padded to a shape.

    Rows and requests come as ``decode_rows`` decodes, then ``prefill_reqs`` requests of together
    ``prefill_rows`` tokens; what the plan does not fill is padding: slot N - 1, sequence length 0,
    nothing stored. The plan must fit. Ids below 0 are replaced by their slot's last token.

    Raises:
        ValueError: a buffer is too small, not contiguous, or on another device.
    """
    check_tensors(packed=packed, **vars(buffers))
    rows, reqs = decode_rows + prefill_rows, decode_rows + prefill_reqs
    if rows > buffers.input_ids.shape[0] or reqs > buffers.slots.shape[0]:
        raise ValueError(f"{rows} rows of {reqs} requests do not fit the step's buffers")
    prepare_kernel[(max(cdiv(rows, BLOCK), 1),)](
        packed,
        *vars(buffers).values(),
        decode_rows,
        prefill_reqs,
        prefill_rows,
        buffers.last_tokens.shape[0] - 1,
        HEADER_LEN=HEADER_LEN,
        RECORD_LEN=RECORD_LEN,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
        **pdl_options(),
    )
