"""Requests are a function of seed and number, of exact length, and never equal by accident."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson
import pytest

from octavo.bench.workload import Workload


def test_requests_repeat_with_the_seed_and_differ_otherwise() -> None:
    workload = Workload(input_len=40, output_len=8, seed=3)
    again = Workload(input_len=40, output_len=8, seed=3)
    other = dataclasses.replace(workload, seed=4)
    prompts = [workload.prompt_token_ids(i) for i in range(20)]
    assert prompts == [again.prompt_token_ids(i) for i in range(20)]
    assert len({tuple(p) for p in prompts}) == 20
    assert prompts != [other.prompt_token_ids(i) for i in range(20)]


def test_lengths_are_exact_and_within_the_spread() -> None:
    workload = Workload(input_len=100, output_len=50, len_spread=0.8)
    lengths = [workload.lengths(i) for i in range(500)]
    assert [len(workload.prompt_token_ids(i)) for i in range(500)] == [n for n, _ in lengths]
    assert min(n for n, _ in lengths) in range(20, 30)
    assert max(n for n, _ in lengths) in range(170, 181)
    assert {n for _, n in lengths} <= set(range(10, 91))
    assert abs(np.mean([n for n, _ in lengths]) - 100) < 10


def test_ids_stay_inside_the_vocabulary() -> None:
    workload = Workload(input_len=2000, output_len=1, min_token_id=5, vocab_size=9)
    assert set(workload.prompt_token_ids(0)) == {5, 6, 7, 8}


def test_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    workload = Workload(input_len=64, output_len=1, shared_prefix_len=32)
    a, b = workload.prompt_token_ids(0), workload.prompt_token_ids(1)
    assert a[:32] == b[:32]
    assert a[32:] != b[32:]
    assert len(a) == len(b) == 64


def test_bodies() -> None:
    workload = Workload(model="m", input_len=6, output_len=9, extra_body={"top_k": 5})
    body = orjson.loads(workload.body(0))
    assert body["prompt"] == workload.prompt_token_ids(0)
    assert body["max_tokens"] == 9
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["ignore_eos"], body["top_k"]) == ("m", True, 5)
    chat = orjson.loads(dataclasses.replace(workload, endpoint="chat").body(0, 2))
    assert len(chat["messages"][0]["content"].split()) == 6
    assert chat["max_tokens"] == 2
    assert "prompt" not in chat


def test_poisson_arrivals_have_the_rate() -> None:
    arrivals = Workload(num_requests=4000, input_len=1, output_len=1).arrivals_s(50.0)
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert abs(len(arrivals) / arrivals[-1] - 50) < 3


@pytest.mark.parametrize(
    "wrong",
    [{"num_requests": 0}, {"input_len": 0}, {"len_spread": 1.0}, {"vocab_size": 50}],
)
def test_impossible_workloads_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Workload(**wrong)  # type: ignore[arg-type]
