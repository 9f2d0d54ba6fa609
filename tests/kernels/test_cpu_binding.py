"""The binding of the CPU kernels refuses a tensor in another's place before any memory is read.

Addresses here are not of any tensor: a call that went through would crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import _core

NOWHERE = 64
WRONG_SHAPE = "in the place of|tuple of length|misaligned"
MATRIX = (NOWHERE, "F32", 2, 8)
FLOATS = (NOWHERE, "F32", 8)
INTS = (NOWHERE, "I32", 2)
TABLE = (NOWHERE, "I32", 1, 4)
CACHE = (NOWHERE, NOWHERE, "F32", (4, 1, 16, 8, 128))


@pytest.fixture(scope="module")
def linear() -> _core.CpuLinear:
    weight = torch.zeros(16, 8)
    rows = weight.view(-1).view(torch.uint8)
    return _core.CpuLinear(16, 8, [((rows.data_ptr(), "U8", rows.numel()), 16, "F32", None)])


def attention(**changed: Any) -> None:
    args = {
        "q": MATRIX,
        "cache": CACHE,
        "block_table": TABLE,
        "slots": INTS,
        "seq_lens": INTS,
        "query_start_loc": (NOWHERE, "I32", 3),
        "scale": 1.0,
        "sliding_window": 0,
        "softcap": 0.0,
        "causal": True,
        "sinks": None,
        "slopes": None,
        "max_seq_len": 1,
        "out": MATRIX,
    }
    _core.cpu_attention(**(args | changed))


def rms_norm(x: Any, residual: Any, weight: Any, *, out: Any) -> None:
    _core.cpu_rms_norm(x, residual, weight, eps=1e-5, weight_offset=0.0, out=out)


def rope(**changed: Any) -> None:
    args = {
        "qkv": (NOWHERE, "F32", 2, 24),
        "positions": INTS,
        "cos_sin": (NOWHERE, "F32", 32, 8),
        "slot_mapping": INTS,
        "cache": CACHE,
        "num_heads": 1,
        "kv_scales": None,
        "q_norm": None,
        "k_norm": None,
        "eps": 1e-6,
        "weight_offset": 0.0,
        "interleaved": False,
        "q": MATRIX,
    }
    _core.cpu_rope(**(args | changed))


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(MATRIX, None, (NOWHERE, "I32", 8), out=MATRIX),
        lambda: rms_norm(MATRIX, None, FLOATS, out=(NOWHERE, "BF16", 2, 8)),
        lambda: _core.cpu_activation("silu", False, MATRIX, (NOWHERE, "I32", 2, 8)),
        lambda: attention(cache=MATRIX),
        lambda: attention(block_table=MATRIX),
        lambda: attention(slots=FLOATS),
        lambda: attention(q=(NOWHERE, "I32", 2, 8)),
        lambda: rope(positions=(NOWHERE, "F32", 2)),
        lambda: rope(cos_sin=(NOWHERE, "BF16", 32, 8)),
        lambda: rope(slot_mapping=NOWHERE),
        lambda: _core.cpu_argmax((NOWHERE, "I32", 2, 8), INTS),
        lambda: _core.cpu_argmax(MATRIX, (NOWHERE, "F32", 2)),
        lambda: _core.cpu_argmax((NOWHERE, "F64", 2, 8), INTS),
    ],
)
def test_a_tensor_of_another_type_is_refused(call: Callable[[], None]) -> None:
    with pytest.raises(TypeError):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(MATRIX, FLOATS, FLOATS, out=MATRIX),
        lambda: attention(seq_lens=TABLE),
        lambda: rms_norm(MATRIX, None, (NOWHERE, "F32", 9), out=MATRIX),
        lambda: rms_norm(MATRIX, (NOWHERE, "F32", 3, 8), FLOATS, out=MATRIX),
        lambda: _core.cpu_layer_norm(MATRIX, None, FLOATS, (NOWHERE, "F32", 7), 1e-5, MATRIX),
        lambda: _core.cpu_activation("silu", True, MATRIX, MATRIX),
        lambda: attention(seq_lens=(NOWHERE, "I32", 3)),
        lambda: attention(query_start_loc=INTS),
        lambda: attention(out=(NOWHERE, "F32", 2, 16)),
        lambda: rope(positions=(NOWHERE, "I32", 3)),
        lambda: rope(qkv=MATRIX),
        lambda: rope(q_norm=(NOWHERE, "F32", 4)),
        lambda: _core.cpu_argmax(MATRIX, (NOWHERE, "I32", 3)),
        lambda: _core.cpu_selected_logprobs(MATRIX, TABLE, MATRIX, INTS),
        lambda: _core.cpu_argmax((1, "F32", 2, 8), INTS),
    ],
)
def test_a_tensor_of_another_shape_is_refused(call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=WRONG_SHAPE):
        call()


def test_a_weight_refuses_other_inputs_and_outputs(linear: _core.CpuLinear) -> None:
    out = (NOWHERE, "F32", 2, 16)
    for x, bias, y in [
        (out, None, MATRIX),
        (MATRIX, (NOWHERE, "F32", 8), out),
        (MATRIX, None, (NOWHERE, "F32", 3, 16)),
    ]:
        with pytest.raises(ValueError, match=WRONG_SHAPE):
            linear.forward(x, bias, 16, y)
    with pytest.raises(TypeError):
        linear.embedding(FLOATS, 1.0, (NOWHERE, "F32", 8, 8))
    with pytest.raises(ValueError, match=WRONG_SHAPE):
        linear.embedding(INTS, 1.0, out)
