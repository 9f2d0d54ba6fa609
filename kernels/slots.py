"""The slot table's columns: everything a request carries from step to step, in one int32 record.

``slot_table`` is int32 [N, RECORD_LEN], a row per slot; row N - 1 is padding's. A column is named
here and nowhere else: the host writes a record by these names, the plan brings it to the device as
it is, ``prepare_step`` copies it into its row, and a kernel reads a column by its compile-time name
(``gpu.slots.load_column``). The same record serves the CPU's sampler.

To add a sampling parameter, name its column below and in ``PARAMETERS`` (the name must be that of
SamplingParams' field); the record then carries it, and only the code that uses it is left to write:
``reference.sample``, the CPU's ``draw`` and ``gpu/pick_token.py``. Anything else a step needs of a
request is one more column too, before ``NUM_HOST_COLUMNS`` where the host writes it at admission (a
LoRA adapter's index, a grammar's mask row) and after it where kernels do (how many drafts were
kept)::

    LORA_INDEX = Column("lora_index", 11)                      # here; one on in those that follow
    record[LORA_INDEX.index] = state.lora_index                # runner/slots.py
    lora = load_column(slot_table, slot, LORA_INDEX)           # a kernel, after
    LORA_INDEX = tl.constexpr(columns.LORA_INDEX)              # at the head of its file

It lies beside the op sets because the host, the CPU's sampler and the Triton kernels all import it,
and needs neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One int32 of a record, or with ``is_float`` the bits of a float32.

    ``neutral``: its value in the padding's row, with which it changes nothing.
    """

    name: str
    index: int
    is_float: bool = False
    neutral: float = 0


# The row's own number: tells prepare_step where a record goes.
SLOT = Column("slot", 0)
NUM_PROMPT_TOKENS = Column("num_prompt_tokens", 1)
# Of the request's 64-bit seed.
SEED_LOW = Column("seed_low", 2)
SEED_HIGH = Column("seed_high", 3)
TEMPERATURE = Column("temperature", 4, is_float=True)  # 0: greedy
TOP_K = Column("top_k", 5)  # 0 or below: off
TOP_P = Column("top_p", 6, is_float=True, neutral=1)
MIN_P = Column("min_p", 7, is_float=True)
REPETITION_PENALTY = Column("repetition_penalty", 8, is_float=True, neutral=1)
PRESENCE_PENALTY = Column("presence_penalty", 9, is_float=True)
FREQUENCY_PENALTY = Column("frequency_penalty", 10, is_float=True)
NUM_HOST_COLUMNS = 11

# Written by kernels alone; a new record leaves them as they are.
LAST_TOKEN = Column("last_token", 11)  # the id sampled last
OUTPUT_POSITION = Column("output_position", 12)  # tokens generated so far

# A power of two, so that a tile of records has no gaps; 64 bytes are two sectors of memory.
RECORD_LEN = 16

# Copied from SamplingParams under the same names.
PARAMETERS = (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    REPETITION_PENALTY,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
)
COLUMNS = (
    SLOT,
    NUM_PROMPT_TOKENS,
    SEED_LOW,
    SEED_HIGH,
    *PARAMETERS,
    LAST_TOKEN,
    OUTPUT_POSITION,
)
