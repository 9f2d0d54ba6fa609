"""SamplingParams: vLLM's leniency, and one error that names the field for everything else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from octavo.errors import InvalidParameterError
from octavo.sampling_params import MAX_N, SamplingParams

DEEP: Any = []
for _ in range(5000):
    DEEP = [DEEP]

INTEGERS = ["n", "top_k", "min_tokens"]
OPTIONAL_INTEGERS = ["seed", "max_tokens", "stream_interval", "logprobs", "prompt_logprobs"]
REALS = [
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
]
BOOLEANS = [
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
]
TEXTS = ["stop", "bad_words"]
IDS = ["stop_token_ids", "allowed_token_ids"]
NO_NUMBERS: list[Any] = ["1", b"1", [1], {1: 1}, DEEP, 1j, object(), np.array([1, 2])]
NO_LISTS: list[Any] = [5, 1.5, True, b"x", {1: 2}, iter("ab"), object()]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, v) for f in INTEGERS for v in [*NO_NUMBERS, None, 1.5, True, np.float32(1)]),
        *((f, v) for f in OPTIONAL_INTEGERS for v in [*NO_NUMBERS, 1.5, False, math.nan]),
        *((f, v) for f in REALS for v in [*NO_NUMBERS, None, True, math.nan, math.inf, 10**400]),
        *((f, v) for f in BOOLEANS for v in [*NO_NUMBERS, None, 5, "true", math.nan]),
        *((f, v) for f in TEXTS for v in [*NO_LISTS, [1], [b"x"], [None], ["\ud800"], [["x"]]]),
        *((f, v) for f in IDS for v in [*NO_LISTS, "12", ["1"], [1.5], [None], [True], [[1]]]),
        ("bad_words", "word"),
        ("stop", [""]),
        ("stop", ""),
        *(("logit_bias", v) for v in [5, "x", [1, 2], [(1, 2)], {"a": 1}, {1.5: 1}, {True: 1}]),
        *(("logit_bias", {5: v}) for v in ["x", None, math.nan, math.inf, 1e300, [1], True]),
        ("n", 0),
        ("n", MAX_N + 1),
        *((f, 2**70) for f in ["n", "top_k", "min_tokens", "seed", "stream_interval", "logprobs"]),
        ("prompt_logprobs", 2**70),
        ("seed", -(2**63) - 1),
        ("repetition_penalty", 1e-320),
        ("repetition_penalty", 1e308),
        ("top_k", -2),
    ],
)
def test_odd_values_are_refused_by_name(field: str, value: Any) -> None:
    given = {"max_tokens": None, field: value}
    with pytest.raises(InvalidParameterError, match=rf"^{field} must be ") as caught:
        SamplingParams(**given)
    assert caught.value.param == field
    assert len(str(caught.value)) < 300
    assert isinstance(caught.value, ValueError)


def test_what_vllm_takes_is_taken() -> None:
    found = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_p=np.float16(1),
        top_k=np.int32(5),
        seed=np.uint64(2**64 - 1),
        max_tokens=np.int8(9),
        stop="END",
        stop_token_ids=np.array([4, 5]),
        allowed_token_ids=[np.int64(7)],
        bad_words=["word"],
        ignore_eos=np.bool_(True),
        skip_special_tokens=0,
        logprobs=True,
        logit_bias={np.int64(3): np.float32(1.5), 4: -math.inf},
    )
    expected = SamplingParams(
        n=2,
        temperature=0.5,
        top_p=1.0,
        top_k=5,
        seed=2**64 - 1,
        max_tokens=9,
        stop=("END",),
        stop_token_ids=(4, 5),
        allowed_token_ids=(7,),
        bad_words=("word",),
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=1,
        logit_bias={3: 1.5, 4: -math.inf},
    )
    assert found == expected
    for name in SamplingParams.__slots__:
        assert type(getattr(found, name)) is type(getattr(expected, name)), name
    assert {type(token) for token in found.stop_token_ids + found.allowed_token_ids} == {int}
    nothing: Any = {"stop": None, "stop_token_ids": None, "bad_words": [], "logit_bias": None}
    assert SamplingParams(**nothing) == SamplingParams()
    assert SamplingParams(max_tokens=10**30).max_tokens == 10**30


def test_what_was_given_may_change_afterwards() -> None:
    stop, bias = ["a"], {5: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)  # type: ignore[arg-type]
    stop.append("b")
    bias["x"] = "y"  # type: ignore[index,assignment]
    assert (params.stop, params.logit_bias) == (("a",), {5: 1.0})
