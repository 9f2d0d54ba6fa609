"""The slot table: a record that the host writes is what every kernel reads.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from octavo.kernels import reference, slots  # noqa: E402
from octavo.kernels.gpu.slots import load_column  # noqa: E402
from octavo.kernels.gpu.step import HEADER, HEADER_LEN  # noqa: E402
from octavo.kernels.shared_prefixes import GROUP_FIELDS, MAX_GROUPS  # noqa: E402
from octavo.runner.request_state import RequestState  # noqa: E402
from octavo.runner.slots import SlotRecords, column_of, seeds_of  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNWRITTEN = -7


def test_columns_have_places_of_their_own() -> None:
    indices = [column.index for column in slots.COLUMNS]
    assert sorted(indices) == list(range(len(indices)))
    assert len(indices) <= slots.RECORD_LEN
    by_kernels = [c for c in slots.COLUMNS if c.index >= slots.NUM_HOST_COLUMNS]
    assert by_kernels == [slots.LAST_TOKEN, slots.OUTPUT_POSITION]
    named = [v for v in vars(slots).values() if isinstance(v, slots.Column)]
    assert sorted(named, key=lambda c: c.index) == sorted(slots.COLUMNS, key=lambda c: c.index)


def test_parameters_are_sampling_params_fields() -> None:
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    for column in slots.PARAMETERS:
        assert isinstance(fields[column.name].default, float if column.is_float else int)


# ------------------------------------------------------------------------- from host to kernel


@triton.jit
def read_kernel(slot_table, found, COLUMN: tl.constexpr):
    slot = tl.program_id(0)
    tl.store(found + slot, load_column(slot_table, slot, COLUMN))


def read_by_kernel(table: torch.Tensor, column: slots.Column) -> list[float]:
    dtype = torch.float32 if column.is_float else torch.int32
    found = torch.full((table.shape[0],), UNWRITTEN, dtype=dtype, device=DEVICE)
    read_kernel[(table.shape[0],)](table, found, COLUMN=tl.constexpr(column))
    values: list[float] = found.tolist()
    return values


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(-1, 2**31 - 1),
    top_p=st.floats(2**-20, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)
STATES = st.builds(
    RequestState,
    request_id=st.just(0),
    params=PARAMS,
    # Only its length is read.
    prompt_token_ids=st.integers(1, 2**31 - 1).map(range),
    max_tokens=st.just(1),
    arrival_s=st.just(0.0),
    seed=st.integers(-(2**63), 2**64 - 1),
)


def expected(state: RequestState, column: slots.Column, slot: int) -> float:
    assert state.seed is not None
    special = {
        slots.SLOT: slot,
        slots.NUM_PROMPT_TOKENS: state.num_prompt_tokens,
        slots.SEED_LOW: int(np.int32(np.uint32(state.seed & 0xFFFFFFFF))),
        slots.SEED_HIGH: int(np.int32(np.uint32(state.seed >> 32 & 0xFFFFFFFF))),
    }
    if column in special:
        return special[column]
    if column is slots.TEMPERATURE and state.params.greedy:
        return 0.0
    value = getattr(state.params, column.name)
    return float(np.float32(value)) if column.is_float else min(value, 2**31 - 1)


# An example takes a second in the interpreter: too long to shrink a failure.
@settings(deadline=None, max_examples=10, phases=[Phase.generate])
@given(st.lists(STATES, min_size=1, max_size=5), st.data())
def test_a_record_reaches_the_kernels(states: list[RequestState], data: Any) -> None:
    """From the host's record through the packed plan and prepare_step to each column."""
    num_slots = 7
    order = data.draw(st.permutations(range(num_slots - 1)))[: len(states)]
    records = SlotRecords(num_slots)
    written = [records.write(slot, s) for slot, s in zip(order, states, strict=True)]
    table = torch.tensor(SlotRecords(num_slots).rows, device=DEVICE)
    table[:, slots.NUM_HOST_COLUMNS :] = UNWRITTEN
    plan = [0]  # of no token and no request: one start
    header = HEADER.pack(0, 0, 0, 0, 0, len(states), len(plan), 0)
    packed = np.concatenate([np.frombuffer(header, np.int32), np.array(plan, np.int32), *written])
    gpu.prepare_step(
        torch.tensor(packed, device=DEVICE),
        make_buffers(table, rows=3, reqs=3),
        decode_rows=2,
        prefill_reqs=0,
        prefill_rows=0,
    )
    for column in slots.COLUMNS:
        found = read_by_kernel(table, column)
        for slot in range(num_slots):
            if column.index >= slots.NUM_HOST_COLUMNS:
                want: float = UNWRITTEN
            elif slot in order:
                want = expected(states[order.index(slot)], column, slot)
            else:
                want = column.neutral
            assert found[slot] == want, (column, slot)
            if column.index < slots.NUM_HOST_COLUMNS:
                assert column_of(records.rows, column)[slot] == want
    seeds = seeds_of(records.rows)
    for slot, state in zip(order, states, strict=True):
        assert state.seed is not None
        assert int(seeds[slot]) == state.seed % 2**64


# ---------------------------------------------------------------------------------- prepare_step


def make_buffers(table: torch.Tensor, rows: int, reqs: int, blocks: int = 5) -> Any:
    def unwritten(*shape: int) -> torch.Tensor:
        return torch.full(shape, UNWRITTEN, dtype=torch.int32, device=DEVICE)

    return gpu.StepBuffers(
        input_ids=unwritten(rows),
        positions=unwritten(rows),
        slot_mapping=unwritten(rows),
        slots=unwritten(reqs),
        seq_lens=unwritten(reqs),
        query_start_loc=unwritten(reqs + 1),
        sample_rows=unwritten(reqs),
        sample_slots=unwritten(reqs),
        block_table=unwritten(table.shape[0], blocks),
        shared_groups=unwritten(MAX_GROUPS, GROUP_FIELDS),
        shared_members=unwritten(reqs),
        shared_tokens=unwritten(reqs),
        slot_table=table,
        sampled_table=table,
    )


@pytest.mark.parametrize(
    ("decodes", "prefills", "shape", "num_samples", "num_updates", "num_records"),
    [
        (0, [], (1, 0, 0), 0, 0, 0),  # a plan that was carried out already
        (1, [], (1, 0, 0), 1, 0, 0),
        (3, [], (8, 0, 0), 3, 2, 0),
        (3, [5, 1, 70], (4, 3, 76), 6, 300, 3),
        (0, [9, 4], (0, 4, 32), 1, 7, 2),
        (2, [1], (2, 1, 1), 2, 1, 1),
        (300, [], (320, 0, 0), 300, 5, 0),
        (1, [1] * 69, (2, 80, 80), 70, 140, 70),
    ],
)
@pytest.mark.parametrize("shares", [False, True])
def test_prepare_step(
    decodes: int,
    prefills: list[int],
    shape: tuple[int, int, int],
    num_samples: int,
    num_updates: int,
    num_records: int,
    shares: bool,
) -> None:
    if shares and (prefills or not decodes):
        pytest.skip("a plan of decodes alone shares")
    rng = np.random.default_rng(decodes + len(prefills))
    query_lens = [1] * decodes + prefills
    num_tokens, num_reqs = sum(query_lens), len(query_lens)
    num_slots = num_reqs + 3
    table = torch.tensor(rng.integers(0, 99, (num_slots, slots.RECORD_LEN)), dtype=torch.int32)
    ids = rng.integers(0, 1000, num_tokens)
    ids[:decodes:2] = -1  # still on the device
    requests = rng.permutation(num_slots - 1)[:num_reqs]
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    sampled = np.sort(rng.permutation(num_reqs)[:num_samples])
    rows, sample_slots = np.zeros(num_reqs, int), np.zeros(num_reqs, int)
    rows[:num_samples], sample_slots[:num_samples] = starts[sampled + 1] - 1, requests[sampled]
    plan = [
        ids,
        rng.integers(100, 200, num_tokens),
        rng.integers(0, 4000, num_tokens),
        requests,
        rng.integers(1, 300, num_reqs),
        starts,
        rows,
        sample_slots,
        rng.permutation(num_slots * 100)[:num_updates],
        rng.integers(0, 1000, num_updates),
    ]
    if shares:
        plan.append(rng.integers(0, 99, MAX_GROUPS * GROUP_FIELDS))
        plan += [rng.integers(0, num_reqs, num_reqs), rng.integers(0, 999, num_reqs)]
    new = rng.integers(-(2**31), 2**31, (num_records, slots.RECORD_LEN))
    new[:, slots.SLOT.index] = rng.permutation(num_slots - 1)[:num_records]
    new[:, slots.NUM_PROMPT_TOKENS.index] = rng.integers(1, 50, num_records)
    length = sum(len(section) for section in plan)
    header = [num_tokens, num_reqs, decodes, num_samples, num_updates, num_records, length, 2]
    assert len(header) == HEADER_LEN
    packed = torch.tensor(np.concatenate([header, *plan, new.reshape(-1)]), dtype=torch.int32)

    decode_rows, prefill_reqs, prefill_rows = shape
    options: dict[str, Any] = dict(
        zip(("decode_rows", "prefill_reqs", "prefill_rows"), shape, strict=True), shares=shares
    )
    size, reqs = decode_rows + prefill_rows + 2, decode_rows + prefill_reqs + 2
    buffers = make_buffers(table.to(DEVICE), size, reqs, blocks=100)
    # A later stage's.
    buffers = buffers._replace(sampled_table=buffers.slot_table.flip(0).contiguous())
    want = {name: tensor.cpu().clone() for name, tensor in buffers._asdict().items()}
    reference.prepare_step(packed, want, **options)
    gpu.prepare_step(packed.to(DEVICE), buffers, **options)
    for name, tensor in buffers._asdict().items():
        assert torch.equal(tensor.cpu(), want[name]), name


def test_prepare_step_refuses_what_does_not_fit() -> None:
    table = torch.tensor(SlotRecords(4).rows, device=DEVICE)
    buffers = make_buffers(table, rows=2, reqs=2)
    packed = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="3 rows of 3 requests do not fit"):
        gpu.prepare_step(packed, buffers, decode_rows=3, prefill_reqs=0, prefill_rows=0)
