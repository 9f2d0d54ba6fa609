"""The sampler against naive implementations, and its distributions against chi-square."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from octavo.kernels import reference
from octavo.runner.draw import uniforms
from octavo.runner.logprobs import LogprobsMode, NamedTokens, copy_logprobs, processed_logits
from octavo.runner.masks import Masks
from octavo.runner.request_state import RequestState
from octavo.runner.sampler import SampledTokens, Sampler
from octavo.runner.slots import SlotRecords
from octavo.sampling_params import SamplingParams


def state(num_prompt_tokens: int = 4, **fields: Any) -> RequestState:
    """A request; keywords of RequestState, the rest SamplingParams'."""
    own = {k: fields.pop(k) for k in list(fields) if k in RequestState.__slots__}
    own = {"prompt_token_ids": [0] * num_prompt_tokens, "max_tokens": 1, **own}
    params = SamplingParams(**fields)
    return RequestState(request_id=0, params=params, arrival_s=0.0, **own)


def sample(
    logits: torch.Tensor, states: list[RequestState], num_outputs: int = 0, sampler: Any = None
) -> SampledTokens:
    """One step; row i is the request of slot i, its next token the num_outputs-th."""
    if sampler is None:
        sampler = Sampler(len(states), seed=0)
        for slot, s in enumerate(states):
            sampler.admit(slot, s)
    slots = np.arange(len(states), dtype=np.int32)
    prompts = np.array([s.num_prompt_tokens for s in states])
    positions = (prompts + num_outputs - 1).astype(np.int32)
    result: SampledTokens = sampler.sample(logits.clone(), slots, positions)
    return result


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def test_greedy_is_the_maximum_of_each_row() -> None:
    logits = random_logits(9, 1000)
    result = sample(logits, [state(temperature=0) for _ in range(9)])
    assert result.token_ids.tolist() == logits.argmax(-1).tolist()
    assert result.token_ids.dtype == np.int32
    assert result.logprobs is None


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k beyond the candidates": {"top_k": 700, "temperature": 2.0},
    "top_p": {"top_p": 0.6},
    "top_p tiny": {"top_p": 1e-9},
    "top_p beyond the candidates": {"top_p": 0.99, "temperature": 2.0},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "top_k and min_p": {"top_k": 500, "min_p": 0.3},
    "top_k beyond the vocabulary": {"top_k": 10**6},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_is_the_naive_one(name: str, vocab_size: int, ties: bool) -> None:
    rows = 64
    logits = random_logits(rows, vocab_size)
    if ties:
        logits = (logits * 2).round() / 2
    states = [state(seed=i, **FILTERS[name]) for i in range(rows)]
    result = sample(logits, states, num_outputs=7)
    p = states[0].params
    uniform = uniforms(np.arange(rows, dtype=np.uint64), np.full(rows, 7))
    expected = reference.sample(
        logits,
        torch.full((rows,), p.temperature),
        torch.full((rows,), p.top_k, dtype=torch.int32),
        torch.full((rows,), p.top_p, dtype=torch.float64),
        torch.full((rows,), p.min_p),
        torch.from_numpy(uniform),
    )
    # A draw may fall on a boundary that float32 rounds to the other side.
    agree = (torch.from_numpy(result.token_ids) == expected).sum()
    assert agree >= rows - 1


def chi_square(counts: np.ndarray[Any, Any], probs: np.ndarray[Any, Any]) -> float:
    """How many standard deviations chi-square is above its mean; 4 is one in 30,000."""
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0
    expected, counts = expected[probs > 0], counts[probs > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    return float((statistic - degrees) / math.sqrt(2 * degrees)) if degrees else 0.0


@pytest.mark.parametrize("name", ["plain", "cool", "hot", "top_k", "top_p", "min_p", "all"])
@pytest.mark.parametrize("per", ["seed", "position"])
def test_draws_are_distributed_as_they_should(name: str, per: str) -> None:
    vocab_size, draws = 12, 20_000
    options = FILTERS[name]
    logits = random_logits(1, vocab_size, seed=3, scale=1.0)
    p = SamplingParams(**options)
    probs = (logits[0].double() / p.temperature).softmax(-1)
    probs[probs < p.min_p * probs.max()] = 0
    if p.top_k:
        probs[probs < probs.topk(min(p.top_k, vocab_size)).values[-1]] = 0
    probs /= probs.sum()
    ordered, order = probs.sort(descending=True)
    probs[order[(ordered.cumsum(0) - ordered) >= p.top_p]] = 0
    probs /= probs.sum()
    if per == "seed":
        states = [state(seed=i, **options) for i in range(draws)]
        tokens = sample(logits.expand(draws, -1), states).token_ids
    else:
        sampler = Sampler(1, seed=0)
        sampler.admit(0, state(seed=99, **options))
        tokens = np.concatenate(
            [
                sampler.sample(
                    logits.repeat(1000, 1),
                    np.zeros(1000, np.int32),
                    np.arange(at, at + 1000, dtype=np.int32),
                ).token_ids
                for at in range(0, draws, 1000)
            ]
        )
    assert chi_square(np.bincount(tokens, minlength=vocab_size), probs.numpy()) < 4


def test_uniforms_are_uniform_and_unrelated() -> None:
    n = 100_000
    seeds, counters = np.arange(n, dtype=np.uint64), np.arange(n)
    one = uniforms(np.zeros(n, np.uint64), counters)
    other = uniforms(seeds, np.zeros(n, np.int64))
    neighbour = uniforms(np.ones(n, np.uint64), counters)
    for values in (one, other, neighbour):
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, 100, (0, 1))[0]
        assert chi_square(counts, np.full(100, 0.01)) < 4
    for a, b in ((one[:-1], one[1:]), (one, other), (one, neighbour)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)


def test_a_seeded_token_does_not_depend_on_the_batch() -> None:
    logits = random_logits(8, 5000)
    options = [FILTERS[k] for k in ("plain", "all", "top_p", "hot", "min_p", "top_k")]
    states = [state(seed=1000 + i, **options[i % 6]) for i in range(8)]
    together = sample(logits, states, num_outputs=3).token_ids
    for i in range(8):
        alone = sample(logits[i : i + 1], [states[i]], num_outputs=3).token_ids
        assert alone[0] == together[i]
    other_position = sample(logits, states, num_outputs=4).token_ids
    assert (other_position != together).any()


def test_requests_without_a_seed_draw_one_each_from_the_engines() -> None:
    logits = random_logits(1, 1000, scale=0.1).expand(16, -1)
    first = sample(logits, [state() for _ in range(16)]).token_ids
    again = sample(logits, [state() for _ in range(16)]).token_ids
    assert len(set(first.tolist())) > 8
    assert first.tolist() == again.tolist()
    kept = state()
    sample(logits[:1], [kept])
    assert kept.seed is not None


def naive_penalties(
    logits: torch.Tensor, prompt: list[int], output: list[int], p: SamplingParams
) -> torch.Tensor:
    out = logits.clone()
    for token in range(len(out)):
        if token in prompt or token in output:
            factor = p.repetition_penalty
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= p.frequency_penalty * output.count(token)
        out[token] -= p.presence_penalty * (token in output)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -0.9},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    ],
)
def test_penalties_follow_the_tokens_as_they_come(options: dict[str, Any]) -> None:
    vocab_size = 20
    prompts = [[1, 2, 2, 3], [5]]
    requests = [
        state(len(p), prompt_token_ids=p, temperature=0, logprobs=1, **options) for p in prompts
    ]
    requests.append(state(temperature=0))  # one without, between
    sampler = Sampler(3, seed=0)
    for slot, request in enumerate(requests):
        sampler.admit(slot, request)
    outputs: list[list[int]] = [[], [], []]
    for step in range(100):
        logits = random_logits(3, vocab_size, seed=step, scale=1.0)
        tokens = sample(logits, requests, step, sampler).token_ids.tolist()
        for i, prompt in enumerate(prompts):
            expected = naive_penalties(logits[i], prompt, outputs[i], requests[i].params)
            assert tokens[i] == int(expected.argmax())
        assert tokens[2] == int(logits[2].argmax())
        for out, token in zip(outputs, tokens, strict=True):
            out.append(token)
        if step == 50:  # preempted: another slot state, the same request
            sampler.admit(0, requests[0])
    assert requests[0].output_token_ids == outputs[0]


def test_logit_bias_is_added() -> None:
    logits = random_logits(2, 30)
    worst = int(logits[0].argmin())
    bias = {worst: 100.0, 3: -100.0}
    result = sample(logits, [state(temperature=0, logit_bias=bias), state(temperature=0)])
    assert result.token_ids.tolist() == [worst, int(logits[1].argmax())]


def test_allowed_token_ids_are_the_only_ones() -> None:
    logits = random_logits(200, 50)
    allowed = (4, 8, 15)
    states = [state(seed=i, allowed_token_ids=allowed) for i in range(200)]
    tokens = sample(logits, states).token_ids
    assert set(tokens.tolist()) == set(allowed)
    greedy = sample(logits[:1], [state(temperature=0, allowed_token_ids=allowed)]).token_ids
    assert greedy[0] == max(allowed, key=lambda t: float(logits[0, t]))


def test_min_tokens_holds_back_the_end_until_then() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 2], logits[0, 5], logits[0, 7] = 9.0, 8.0, 7.0
    request = state(
        temperature=0, min_tokens=3, stop_token_ids=(5,), eos_token_ids=(2,), max_tokens=9
    )
    tokens = [int(sample(logits, [request], n).token_ids[0]) for n in range(5)]
    assert tokens == [7, 7, 7, 2, 2]


def test_bad_words_of_one_token_never_come() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 4], logits[0, 5] = 7.0, 8.0, 9.0
    # Longer ones are the core's, which masks what would complete them.
    request = state(temperature=0, bad_words_token_ids=((3, 3, 4), (5,)))
    assert [int(sample(logits, [request], n).token_ids[0]) for n in range(3)] == [4] * 3


def test_masks_have_the_last_word() -> None:
    logits = random_logits(5, 70)
    logits[:, 69] = 50.0
    words = np.zeros((5, 3), np.uint32)
    words[0, 2] = 1 << 4  # 68
    words[1, 0] = 0b1010  # 1, 3
    words[2] = 0xFFFFFFFF
    words[4, 0] = 1
    states = [
        state(temperature=0, logit_bias={69: 9.0}),
        state(temperature=1, seed=1, allowed_token_ids=(3, 69)),
        state(temperature=0),
        state(temperature=0, logprobs=1),
        state(temperature=1, seed=2, allowed_token_ids=(69,), frequency_penalty=0.5),
    ]
    sampler = Sampler(5, seed=0)
    for slot, one in enumerate(states):
        sampler.admit(slot, one)
    slots, positions = np.arange(5, dtype=np.int32), np.full(5, 2, np.int32)
    masks = Masks(np.array([0, 1, 2, -1, 4], np.int32), words)
    result = sampler.sample(logits.clone(), slots, positions, masks)
    assert result.token_ids.tolist() == [68, 3, 69, 69, -1]
    # Nothing to choose from is no token of the request.
    assert states[4].output_token_ids == []
    assert result.logprobs is not None
    assert result.logprobs[3, 0] == pytest.approx(float(logits[3].log_softmax(-1)[69]))


def test_what_is_allowed_wins_where_nothing_else_is_left() -> None:
    logits = random_logits(1, 10)
    request = state(seed=1, allowed_token_ids=(6,), min_tokens=4, eos_token_ids=(6,))
    assert sample(logits, [request]).token_ids.tolist() == [6]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4, 100)
    states = [
        state(temperature=0.5, seed=1, logprobs=3, logit_bias={7: 50.0}),
        state(temperature=0),
        state(temperature=0, logprobs=0),
        state(seed=5, logprobs=2, top_k=3),
    ]
    result = sample(logits, states)
    assert result.logprob_ids is not None
    assert result.logprobs is not None
    assert result.ranks is not None
    assert result.logprob_ids.shape == result.logprobs.shape == (4, 4)
    assert (result.logprob_ids.dtype, result.logprobs.dtype) == (np.int32, np.float32)
    assert result.token_ids[0] == 7
    expected = logits.log_softmax(-1)
    for row, k in ((0, 3), (2, 0), (3, 2)):
        ids = result.logprob_ids[row, : 1 + k].tolist()
        assert ids == [int(result.token_ids[row]), *expected[row].topk(k).indices.tolist()]
        np.testing.assert_allclose(
            result.logprobs[row, : 1 + k], expected[row, ids].numpy(), atol=1e-5
        )
        chosen = expected[row, result.token_ids[row]]
        assert result.ranks[row] == int((expected[row] > chosen).sum()) + 1
    assert result.ranks[2] == 1


def test_logprobs_of_tokens_that_a_request_names() -> None:
    """Rows of all kinds in one step, on the host and as a GPU's step has them."""
    logits = random_logits(4, 100)
    named = (3, 99, 3, 0, 41)
    states = [
        state(temperature=0),
        state(temperature=0, logprob_token_ids=named, logit_bias={7: 50.0}),
        state(seed=5, logprobs=2),
        state(seed=6, logprobs=1, logprob_token_ids=(8,)),
    ]
    result = sample(logits, states)
    assert result.logprob_ids is not None
    assert result.logprobs is not None
    assert result.ranks is not None
    assert result.token_ids[1] == 7
    expected = logits.log_softmax(-1)
    tokens = torch.from_numpy(result.token_ids)
    best = expected[2].topk(2).indices.tolist()
    on_device = copy_logprobs(
        logits, tokens, 5, named=[NamedTokens(1, named), NamedTokens(3, (8,))]
    )
    for row, others in ((1, [*named]), (2, best), (3, [8])):
        ids = [int(result.token_ids[row]), *others]
        for found_ids, values in (
            (result.logprob_ids, result.logprobs),
            (on_device.ids.numpy(), on_device.values.numpy()),
        ):
            assert found_ids[row, : len(ids)].tolist() == ids
            np.testing.assert_allclose(
                values[row, : len(ids)], expected[row, ids].numpy(), atol=1e-5
            )
        assert result.ranks[row] == int((expected[row] > expected[row, ids[0]]).sum()) + 1


def naive_processed(logits: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """A row's logits [V] over its temperature, -inf where drawing never comes, token by token."""
    temperature = fields.get("temperature", 1.0)
    if temperature == 0:
        return logits
    scaled = logits.double() / temperature
    probs = scaled.softmax(-1)
    best = float(probs.max())
    kept = [t for t in range(len(probs)) if probs[t] >= fields.get("min_p", 0) * best]
    top_k = fields.get("top_k", 0)
    if 0 < top_k < len(probs):
        bound = sorted((float(probs[t]) for t in kept), reverse=True)[min(top_k, len(kept)) - 1]
        kept = [t for t in kept if probs[t] >= bound]
    if (top_p := fields.get("top_p", 1)) < 1:
        total = sum(float(probs[t]) for t in kept)
        above = {t: sum(float(probs[u]) for u in kept if probs[u] > probs[t]) for t in kept}
        kept = [t for t in kept if above[t] < max(top_p, 1e-12) * total]
    out = torch.full_like(scaled, -math.inf)
    out[kept] = scaled[kept]
    return out.float()


@pytest.mark.parametrize("ties", [False, True])
def test_processed_logits_are_the_naive_ones(ties: bool) -> None:
    settings = [{"temperature": 0}, *FILTERS.values()]
    logits = random_logits(len(settings), 120)
    if ties:
        logits = (logits * 2).round() / 2
    records = SlotRecords(len(settings))
    for slot, fields in enumerate(settings):
        records.write(slot, state(seed=1, **fields))
    ids = logits.argmax(-1)
    found = processed_logits(logits, records.rows, ids)
    for row, fields in enumerate(settings):
        torch.testing.assert_close(found[row], naive_processed(logits[row], fields))
    # The token that was drawn is never told to be impossible.
    worst = logits.argmin(-1)
    chosen = processed_logits(logits, records.rows, worst).gather(1, worst[:, None])
    assert chosen.isfinite().all()


@pytest.mark.parametrize(
    "name", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
)
def test_the_operator_chooses_what_logprobs_are(name: str) -> None:
    logits = random_logits(3, 100)
    fields: list[dict[str, Any]] = [
        {"temperature": 0.5, "top_k": 4, "seed": 1},
        {"temperature": 0},
        {"temperature": 2.0, "top_p": 0.5, "seed": 2},
    ]
    biased = logits.clone()
    biased[1, 7] += 50
    states = [state(logprobs=6, **fields[0]), state(logprobs=6, logit_bias={7: 50}, **fields[1])]
    states.append(state(**fields[2], logprobs=2))
    sampler = Sampler(3, 0, LogprobsMode.of(name))
    for slot, one in enumerate(states):
        sampler.admit(slot, one)
    result = sample(logits, states, sampler=sampler)
    assert result.logprobs is not None
    assert result.logprob_ids is not None
    assert result.token_ids[1] == 7
    source = logits
    if name.startswith("processed"):
        source = torch.stack(
            [naive_processed(row, one) for row, one in zip(biased, fields, strict=True)]
        )
    expected = source.log_softmax(-1) if name.endswith("logprobs") else source
    for row, num in ((0, 7), (1, 7), (2, 3)):
        ids = result.logprob_ids[row, :num].tolist()
        assert ids[0] == result.token_ids[row]
        np.testing.assert_allclose(
            result.logprobs[row, :num], expected[row, ids].numpy(), rtol=1e-5, atol=1e-5
        )
        best = expected[row].topk(num - 1).values
        np.testing.assert_allclose(result.logprobs[row, 1:num], best.numpy(), rtol=1e-5, atol=1e-5)
