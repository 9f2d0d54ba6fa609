"""prepare_step: one step's packed plan becomes the fixed buffers that a captured graph reads.

The first node of every graph. The numbers that change from step to step (of tokens, requests,
block updates) are read from a header in memory, so one graph serves every step that fits its shape.

The packed plan, int32, is what one copy brings to the device::

    header   [HEADER_LEN]  num_tokens, num_reqs, num_decodes, num_samples, num_block_updates,
                           num_records, offset of the records from the plan's begin, and the row
                           of HostIds that the step's ids go to
    plan     the sections of a Staging, unpadded
    records  [num_records, RECORD_LEN]  of requests that just got a slot (see kernels/slots.py)
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import slots as columns
from ..shared_prefixes import GROUP_FIELDS, MAX_GROUPS
from .launch import cdiv, check_tensors, pdl_options
from .slots import RECORD_LEN, column_at

HEADER = struct.Struct("=8i")  # in the order above
HEADER_LEN = 8
HEADER_TURN = 7

PLAN_BEGIN = tl.constexpr(HEADER_LEN)
BLOCK = tl.constexpr(256)  # rows or requests at a time
GROUP_VALUES = tl.constexpr(MAX_GROUPS * GROUP_FIELDS)
BLOCK_RECORDS = tl.constexpr(64)  # records at a time: 8 values a thread

SLOT = tl.constexpr(columns.SLOT)
NUM_PROMPT_TOKENS = tl.constexpr(columns.NUM_PROMPT_TOKENS)
LAST_TOKEN = tl.constexpr(columns.LAST_TOKEN)
OUTPUT_POSITION = tl.constexpr(columns.OUTPUT_POSITION)
NUM_HOST_COLUMNS = tl.constexpr(columns.NUM_HOST_COLUMNS)


class StepBuffers(NamedTuple):
    """The fixed buffers, int32; N = number of slots with the spare."""

    input_ids: torch.Tensor  # [max rows]
    positions: torch.Tensor  # [max rows]
    slot_mapping: torch.Tensor  # [max rows]
    slots: torch.Tensor  # [max requests]
    seq_lens: torch.Tensor  # [max requests]
    query_start_loc: torch.Tensor  # [max requests + 1]
    sample_rows: torch.Tensor  # [max requests]
    sample_slots: torch.Tensor  # [max requests]
    block_table: torch.Tensor  # [N, max_blocks_per_seq]
    shared_groups: torch.Tensor  # [MAX_GROUPS, 3], as SharedPrefixes
    shared_members: torch.Tensor  # [max requests]
    shared_tokens: torch.Tensor  # [max requests]
    slot_table: torch.Tensor  # [N, RECORD_LEN]
    # The one whose last tokens are read: slot_table, or a later stage's, perhaps on another device.
    sampled_table: torch.Tensor  # [N, RECORD_LEN]


class Plan(NamedTuple):
    """The packed plan in a kernel: its counts, and where its sections begin."""

    num_tokens: Any
    num_reqs: Any
    num_decodes: Any
    num_samples: Any
    num_updates: Any
    num_records: Any
    ids: Any  # [num_tokens]; below 0: still on the device
    positions: Any  # [num_tokens]
    slot_mapping: Any  # [num_tokens]
    slots: Any  # [num_reqs]
    seq_lens: Any  # [num_reqs]
    starts: Any  # [num_reqs + 1]
    sample_rows: Any  # [num_reqs]
    sample_slots: Any  # [num_reqs]
    updates: Any  # [2, num_updates]: places in the block table, blocks
    groups: Any  # [MAX_GROUPS, 3], of a step that shares prefixes, as those below
    members: Any  # [num_reqs]
    shared_tokens: Any  # [num_reqs]
    records: Any  # [num_records, RECORD_LEN]


@triton.jit
def read_plan(packed):
    num_tokens = tl.load(packed)
    num_reqs = tl.load(packed + 1)
    num_updates = tl.load(packed + 4)
    ids = packed + PLAN_BEGIN
    slots = ids + 3 * num_tokens
    starts = slots + 2 * num_reqs
    sample_rows = starts + num_reqs + 1
    updates = sample_rows + 2 * num_reqs
    groups = updates + 2 * num_updates
    return Plan(
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        num_decodes=tl.load(packed + 2),
        num_samples=tl.load(packed + 3),
        num_updates=num_updates,
        num_records=tl.load(packed + 5),
        ids=ids,
        positions=ids + num_tokens,
        slot_mapping=ids + 2 * num_tokens,
        slots=slots,
        seq_lens=slots + num_reqs,
        starts=starts,
        sample_rows=sample_rows,
        sample_slots=sample_rows + num_reqs,
        updates=updates,
        groups=groups,
        members=groups + GROUP_VALUES,
        shared_tokens=groups + GROUP_VALUES + num_reqs,
        records=ids + tl.load(packed + 6),
    )


@triton.jit
def write_rows(plan, buffers, decode_rows, prefill_rows):
    """This program's token rows: the decodes, padding, the prefilled tokens, padding."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total_rows = decode_rows + prefill_rows
    is_decode = rows < decode_rows
    token = tl.where(is_decode, rows, rows - decode_rows + plan.num_decodes)
    bound = tl.where(is_decode, plan.num_decodes, plan.num_tokens)
    used = (rows < total_rows) & (token < bound)
    ids = tl.load(plan.ids + token, mask=used, other=0)
    # A negative id is still on the device: the last one sampled in the request's slot.
    on_device = used & (ids < 0)
    slot = tl.load(plan.slots + token, mask=on_device, other=0)
    last_token = column_at(buffers.sampled_table, slot, LAST_TOKEN)
    # From where it is: this device may hold an old copy of another's memory.
    last = tl.load(last_token, mask=on_device, other=0, cache_modifier=".cv")
    ids = tl.where(on_device, last, ids)
    position = tl.load(plan.positions + token, mask=used, other=0)
    mapping = tl.load(plan.slot_mapping + token, mask=used, other=-1)
    in_rows = rows < total_rows
    tl.store(buffers.input_ids + rows, ids, mask=in_rows)
    tl.store(buffers.positions + rows, position, mask=in_rows)
    tl.store(buffers.slot_mapping + rows, mapping, mask=in_rows)


@triton.jit
def update_block_table(plan, block_table):
    """This program's share of the block updates."""
    num_updates = plan.num_updates
    for start in range(tl.program_id(0) * BLOCK, num_updates, tl.num_programs(0) * BLOCK):
        u = start + tl.arange(0, BLOCK)
        at = tl.load(plan.updates + u, mask=u < num_updates, other=0)
        block = tl.load(plan.updates + num_updates + u, mask=u < num_updates, other=0)
        tl.store(block_table + at, block, mask=u < num_updates)


@triton.jit
def write_records(plan, slot_table):
    """The host's columns of new requests' records, each to the row that its SLOT names."""
    column = tl.arange(0, RECORD_LEN)[None, :]
    for start in range(0, plan.num_records, BLOCK_RECORDS):
        n = start + tl.arange(0, BLOCK_RECORDS)
        known = n < plan.num_records
        slot = tl.load(column_at(plan.records, n, SLOT), mask=known, other=0)
        copied = known[:, None] & (column < NUM_HOST_COLUMNS)
        values = tl.load(plan.records + n[:, None] * RECORD_LEN + column, mask=copied, other=0)
        tl.store(slot_table + slot[:, None] * RECORD_LEN + column, values, mask=copied)


@triton.jit
def write_requests(plan, buffers, decode_rows, prefill_reqs, spare):
    """Requests and samples: the decodes, padding, the prefills, padding."""
    num_decodes = plan.num_decodes
    total_reqs = decode_rows + prefill_reqs
    for start in range(0, total_reqs + 1, BLOCK):
        r = start + tl.arange(0, BLOCK)
        in_reqs = r < total_reqs
        decodes = r < decode_rows
        req = tl.where(decodes, r, r - decode_rows + num_decodes)
        known = in_reqs & (req < tl.where(decodes, num_decodes, plan.num_reqs))
        slot = tl.load(plan.slots + req, mask=known, other=spare)
        tl.store(buffers.slots + r, slot, mask=in_reqs)
        seq_len = tl.load(plan.seq_lens + req, mask=known, other=0)
        tl.store(buffers.seq_lens + r, seq_len, mask=in_reqs)
        begin = tl.load(plan.starts + req, mask=known, other=plan.num_tokens)
        begin = tl.where(decodes, r, begin - num_decodes + decode_rows)
        tl.store(buffers.query_start_loc + r, begin, mask=r <= total_reqs)

        sampled = (r < plan.num_samples) & in_reqs
        row = tl.load(plan.sample_rows + r, mask=sampled, other=0)
        slot = tl.load(plan.sample_slots + r, mask=sampled, other=spare)
        moved = tl.where(row < num_decodes, row, row - num_decodes + decode_rows)
        tl.store(buffers.sample_rows + r, tl.where(sampled, moved, 0), mask=in_reqs)
        tl.store(buffers.sample_slots + r, slot, mask=in_reqs)
        # The sample is of the token that follows position.
        position = tl.load(plan.positions + row, mask=sampled, other=0)
        prompt = column_at(buffers.slot_table, slot, NUM_PROMPT_TOKENS)
        output = position + 1 - tl.load(prompt, mask=sampled, other=0)
        tl.store(column_at(buffers.slot_table, slot, OUTPUT_POSITION), output, mask=sampled)


@triton.jit
def write_shared(plan, buffers, decode_rows):
    """The groups of decodes that share prefixes; padding is in none."""
    g = tl.arange(0, BLOCK)
    in_groups = g < GROUP_VALUES
    groups = tl.load(plan.groups + g, mask=in_groups, other=0)
    tl.store(buffers.shared_groups + g, groups, mask=in_groups)
    for start in range(0, decode_rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        known = r < plan.num_reqs
        member = tl.load(plan.members + r, mask=known, other=0)
        tokens = tl.load(plan.shared_tokens + r, mask=known, other=0)
        tl.store(buffers.shared_members + r, member, mask=r < decode_rows)
        tl.store(buffers.shared_tokens + r, tokens, mask=r < decode_rows)


@triton.jit(do_not_specialize=["decode_rows", "prefill_reqs", "prefill_rows", "spare"])
def prepare_kernel(
    packed,
    buffers,  # StepBuffers
    decode_rows,
    prefill_reqs,
    prefill_rows,
    spare,  # the slot of padding
    SHARES: tl.constexpr,  # the plan has groups
    EARLY: tl.constexpr,  # let the next kernel start while this one runs
    PDL: tl.constexpr,
):
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    plan = read_plan(packed)
    write_rows(plan, buffers, decode_rows, prefill_rows)
    update_block_table(plan, buffers.block_table)
    if tl.program_id(0) == 0:
        if SHARES:
            write_shared(plan, buffers, decode_rows)
        write_records(plan, buffers.slot_table)
        # NUM_PROMPT_TOKENS is read back below, by other threads of this program.
        tl.debug_barrier()
        write_requests(plan, buffers, decode_rows, prefill_reqs, spare)


def prepare_step(
    packed: torch.Tensor,
    buffers: StepBuffers,
    *,
    decode_rows: int,
    prefill_reqs: int,
    prefill_rows: int,
    shares: bool = False,
    embeds: bool = True,
) -> None:
    """Spread a packed plan over the buffers, padded to a shape.

    Rows and requests come as ``decode_rows`` decodes, then ``prefill_reqs`` requests of together
    ``prefill_rows`` tokens; the rest is padding: slot N - 1, sequence length 0, nothing stored. The
    plan must fit. Ids below 0 are replaced by their slot's last token.

    shares: whether the plan, of decodes alone, names groups that share prefixes.
    embeds: whether ``embedding`` comes next, which lets no kernel behind it start before this one
    has ended: attention reads the buffers without waiting. Where a layer comes next, this one does.

    Raises:
        ValueError: a buffer is too small, not contiguous, or on another device.
    """
    check_tensors(packed=packed, **buffers._replace(sampled_table=buffers.slot_table)._asdict())
    rows, reqs = decode_rows + prefill_rows, decode_rows + prefill_reqs
    if rows > buffers.input_ids.shape[0] or reqs > buffers.slots.shape[0]:
        raise ValueError(f"{rows} rows of {reqs} requests do not fit the step's buffers")
    prepare_kernel[(max(cdiv(rows, BLOCK.value), 1),)](
        packed,
        buffers,
        decode_rows,
        prefill_reqs,
        prefill_rows,
        buffers.slot_table.shape[0] - 1,
        SHARES=shares,
        EARLY=embeds,
        num_warps=4,
        num_stages=1,
        **pdl_options(),
    )
