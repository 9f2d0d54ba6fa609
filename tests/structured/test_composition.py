"""A constraint beside all else that a request may ask for: it is applied last, and changes no neighbour."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from octavo._core import Grammars, Matcher, TokenIds
from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer
from octavo.errors import InvalidParameterError
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import ReasoningTokens, StructuredOutputsParams

EOS = 299
LIST: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "maxLength": 4},
    "minItems": 2,
    "maxItems": 4,
}


def params(wanted: StructuredOutputsParams | None = None, **settings: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"temperature": 1.5, "max_tokens": 120, "seed": 5}
    return SamplingParams(**(defaults | settings), structured_outputs=wanted)


def text_of(llm: LLM, sampling: SamplingParams, prompt: Any = "x") -> str:
    [output] = llm.generate(prompt, sampling, use_tqdm=False)
    [sample] = output.outputs
    assert sample.finish_reason == "stop"
    return sample.text


# ------------------------------------------------------------------------------------- kinds


def test_each_kind(tiny: LLM) -> None:
    kinds: list[tuple[StructuredOutputsParams, str]] = [
        (StructuredOutputsParams(regex=r"\d{3}-[a-f]{2,4}"), r"\d{3}-[a-f]{2,4}"),
        (StructuredOutputsParams(choice=["left", "right\n", "日本"]), "left|right\n|日本"),
        (StructuredOutputsParams(grammar='start: "x" /[0-9]{1,4}/ "y"'), "x[0-9]{1,4}y"),
        (
            StructuredOutputsParams(grammar='root ::= pair{2}\npair ::= [a-c] ("-" | "+")'),
            "([a-c][-+]){2}",
        ),
        (
            StructuredOutputsParams(
                structural_tag={
                    "type": "structural_tag",
                    "format": {
                        "type": "tag",
                        "begin": "<t>",
                        "end": "</t>",
                        "content": {"type": "json_schema", "json_schema": {"type": "boolean"}},
                    },
                }
            ),
            r"<t>\s*(true|false)\s*</t>",
        ),
    ]
    for wanted, pattern in kinds:
        for seed in range(4):
            text = text_of(tiny, params(wanted, seed=seed))
            assert re.fullmatch(pattern, text), (wanted.kind, text)
    text = text_of(
        tiny,
        params(
            StructuredOutputsParams(json_object=True), temperature=0, logit_bias={ord("}"): 100}
        ),
    )
    assert isinstance(json.loads(text), dict)


def test_a_bad_constraint_is_named_before_anything_runs(tiny: LLM) -> None:
    for wanted, param, why in [
        ({"json": {"uniqueItems": True}}, "structured_outputs.json", "at #: uniqueItems"),
        ({"json": '{"a":'}, "structured_outputs.json", "not JSON"),
        ({"regex": "("}, "structured_outputs.regex", "cannot be used"),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar", "nothing"),
        ({"structural_tag": {"format": {"type": "x"}}}, "structured_outputs.structural_tag", '"x"'),
    ]:
        with pytest.raises(InvalidParameterError) as found:
            tiny.generate("x", params(StructuredOutputsParams(**wanted)), use_tqdm=False)
        assert found.value.param == param
        assert why in str(found.value)
        assert "\n" not in str(found.value)
    for wanted in [
        {},
        {"json": {}, "regex": "a"},
        {"regex": 3},
        {"choice": []},
        {"choice": ["a", 1]},
        {"json": 7},
        {"json": {"a": float("nan")}},
        {"json_object": "yes"},
        {"regex": "a", "whitespace_pattern": ""},
        {"json": {}, "disable_any_whitespace": 1},
    ]:
        with pytest.raises(InvalidParameterError, match="structured_outputs"):
            StructuredOutputsParams(**wanted)
    with pytest.raises(InvalidParameterError, match="structured_outputs"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]
    assert SamplingParams(structured_outputs={"regex": "a"}).structured_outputs is not None  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- composition


def test_samples_logprobs_and_penalties(tiny: LLM) -> None:
    wanted = StructuredOutputsParams(json=LIST)
    sampling = params(wanted, n=6, logprobs=2, presence_penalty=0.5, repetition_penalty=1.2)
    [output] = tiny.generate("x", sampling, use_tqdm=False)
    assert len({sample.text for sample in output.outputs}) > 1
    for sample in output.outputs:
        assert 2 <= len(json.loads(sample.text)) <= 4
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(sample.token_ids)
        for token, row in zip(sample.token_ids, sample.logprobs, strict=True):
            # Of the model's own logits: a forced token may be an unlikely one.
            assert row[token].logprob < 0


def test_the_grammar_has_the_last_word(tiny: LLM) -> None:
    yes = StructuredOutputsParams(choice=["yes"])
    for settings in [
        {"min_tokens": 50},
        {"ignore_eos": True},
        {"logit_bias": {ord("y"): -100}},
        {"stop_token_ids": [ord("q")]},
        {"stop": ["never"]},
        {"temperature": 0.0},
        {"top_k": 1, "top_p": 0.1, "min_p": 0.9},
        {"allowed_token_ids": [*range(256)]},
        {"bad_words": ["no"]},
    ]:
        assert text_of(tiny, params(yes, **settings)) == "yes", settings
    # A stop string and a stop token end it all the same.
    for settings in [{"stop": ["e"]}, {"stop_token_ids": [ord("e")]}]:
        assert text_of(tiny, params(yes, **settings)) == "y"
    # EOS only where the text may end, and not before min_tokens where more may come.
    many = StructuredOutputsParams(regex="a*")
    text = text_of(tiny, params(many, min_tokens=7, logit_bias={EOS: 100}))
    assert text == "a" * 7


def test_nothing_is_sampled_from_an_empty_set(tiny: LLM) -> None:
    sampling = [
        params(StructuredOutputsParams(choice=["yes"]), allowed_token_ids=[ord("n")]),
        params(
            StructuredOutputsParams(choice=["yes"]), temperature=0, allowed_token_ids=[ord("n")]
        ),
    ]
    free = params(max_tokens=10)
    [alone] = tiny.generate("x", free, use_tqdm=False)
    for bad in sampling:
        with pytest.raises(RuntimeError, match="failed"):
            tiny.generate("x", bad, use_tqdm=False)
        # The engine lives on.
        [again] = tiny.generate("x", free, use_tqdm=False)
        assert again.outputs[0].token_ids == alone.outputs[0].token_ids


NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a name of some length": {"type": "boolean"},
        "another": {"enum": ["one thing", "one thing more", "something else"]},
        "list": {"type": "array", "items": {"const": "the same"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["a name of some length", "another", "list"],
    "additionalProperties": False,
}


def test_forced_tokens_are_those_that_would_be_sampled(tiny: LLM) -> None:
    wanted = StructuredOutputsParams(json=NAMED, disable_any_whitespace=True)
    launch, steps = tiny._engine.runner.launch, []

    def counted(batch: Any, *args: Any) -> Any:
        steps.append(batch.num_samples)
        return launch(batch, *args)

    tiny._engine.runner.launch = counted  # type: ignore[method-assign]
    num_steps = []
    try:
        for settings in [
            {},
            {"max_tokens": 20},
            {"stop": ["some"]},
            {"stop_token_ids": [ord("m")]},
        ]:
            found = []
            # With log probabilities each token is sampled.
            for more in ({}, {"logprobs": 0}):
                steps.clear()
                sampling = [params(wanted, seed=seed, **(settings | more)) for seed in range(5)]
                outputs = tiny.generate([f"p{seed}" for seed in range(5)], sampling, use_tqdm=False)
                found.append(
                    [
                        (o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason)
                        for o in outputs
                    ]
                )
                num_steps.append(len(steps))
            assert found[0] == found[1], settings
    finally:
        del tiny._engine.runner.launch
    assert 2 * num_steps[0] < num_steps[1]


def test_a_step_whose_tokens_cannot_be_chosen_fails_alone(tiny: LLM) -> None:
    choose = tiny._engine.runner.choose

    def broken(in_flight: Any, fill: Any) -> None:
        raise ValueError("this step's fault")

    tiny._engine.runner.choose = broken  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="failed"):
            tiny.generate("x", params(StructuredOutputsParams(choice=["yes"])), use_tqdm=False)
    finally:
        del tiny._engine.runner.choose
    assert tiny._engine.runner.choose == choose
    assert text_of(tiny, params(StructuredOutputsParams(choice=["yes"]))) == "yes"


def test_free_rows_keep_their_tokens(tiny: LLM) -> None:
    free = [
        params(seed=seed, max_tokens=30, temperature=t) for seed, t in enumerate((0.0, 1.0, 1.5))
    ]
    alone = [tiny.generate(f"p{i}", one, use_tqdm=False)[0] for i, one in enumerate(free)]
    held = params(StructuredOutputsParams(json=LIST))
    mixed = tiny.generate(
        ["p0", "a", "p1", "b", "p2", "c"],
        [free[0], held, free[1], held, free[2], held],
        use_tqdm=False,
    )
    for one, other in zip(alone, mixed[::2], strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    for output in mixed[1::2]:
        json.loads(output.outputs[0].text)


def test_prefix_cache_preemption_and_chunks_change_no_text(
    tiny: LLM, make_tiny: Callable[..., LLM]
) -> None:
    prompts = [{"prompt_token_ids": [*range(3, 60), i]} for i in range(6)]
    wanted = StructuredOutputsParams(json=LIST | {"minItems": 6, "maxItems": 8})
    sampling = [params(wanted, seed=i) for i in range(6)]
    expected = [o.outputs[0].text for o in tiny.generate(prompts, sampling, use_tqdm=False)]
    again = tiny.generate(prompts, sampling, use_tqdm=False)
    assert [o.outputs[0].text for o in again] == expected
    small = make_tiny(
        max_num_seqs=6,
        block_size=4,
        max_model_len=180,
        max_num_batched_tokens=16,
        # Keys and values of 16 floats a token: 48 blocks of 4.
        kv_cache_memory_bytes=48 * 4 * 2 * 16 * 4,
    )
    found = small.generate(prompts, sampling, use_tqdm=False)
    assert [o.outputs[0].text for o in found] == expected
    assert small._engine.core.stats()["num_preemptions"] > 0


def test_an_abort_frees_a_matcher_at_any_step(tiny: LLM) -> None:
    loop = tiny._engine
    for num_steps in range(6):
        held = loop.prepare(TokenIds([1, 2, 3]), params(StructuredOutputsParams(json=LIST), n=2))
        other = loop.prepare(TokenIds([4, 5]), params(StructuredOutputsParams(choice=["abc"])))
        loop.submit(held)
        loop.submit(other)
        for _ in range(num_steps):
            loop.step()
        loop.abort([held[0].request_id])
        while loop.step() or loop.core.has_work():
            loop.core.check_integrity()
        ends = {delta.request_id: delta for delta in loop.core.outbox.drain()}
        assert ends[held[0].request_id].finish_reason == "abort"
        assert ends[other[0].request_id].text == "abc"
        json.loads(ends[held[1].request_id].text)


def test_bad_words_of_several_tokens_break_off(tiny: LLM) -> None:
    free = params(temperature=0, max_tokens=16)
    [output] = tiny.generate("x", free, use_tqdm=False)
    said = list(output.outputs[0].token_ids)
    loop = tiny._engine
    ends = []
    for words in [((said[3], said[4]),), ((said[3], said[4]), tuple(said[:3]))]:
        samples = loop.prepare(TokenIds([*b"x"]), free)
        for sample in samples:
            sample.bad_words_token_ids = words
        loop.submit(samples)
        while loop.step() or loop.core.has_work():
            pass
        [delta] = loop.core.outbox.drain()
        tokens = list(delta.token_ids)
        for word in words:
            assert all(tuple(tokens[i : i + len(word)]) != word for i in range(len(tokens)))
        ends.append(next(i for i, (a, b) in enumerate(zip(said, tokens, strict=True)) if a != b))
    first = next(i for i in range(1, 16) if (said[i - 1], said[i]) == (said[3], said[4]))
    assert ends == [first, min(2, first)]


# ---------------------------------------------------------------------------------- reasoning


def reason(llm: LLM, reasoning: ReasoningTokens, **settings: Any) -> list[int]:
    loop = llm._engine
    sampling = params(StructuredOutputsParams(choice=["abc"]), **settings)
    samples = loop.prepare(TokenIds([1, 2]), sampling, reasoning=reasoning)
    loop.submit(samples)
    while loop.step() or loop.core.has_work():
        pass
    [delta] = loop.core.outbox.drain()
    assert delta.finish_reason == "stop"
    return list(delta.token_ids)


def test_the_grammar_begins_after_reasoning(tiny: LLM) -> None:
    opening, closing = 280, 281
    abc = list(b"abc")
    forced = {closing: 3.0}
    open_already = ReasoningTokens(None, closing, True)
    for seed in range(3):
        found = reason(tiny, open_already, seed=seed, logit_bias=forced, max_tokens=900)
        at = found.index(closing)
        assert found[at + 1 :] == abc
    # A budget forces the end.
    found = reason(tiny, open_already._replace(budget=5), logit_bias={EOS: -100})
    assert found[5] == closing
    assert found[6:] == abc
    # Not open: it may begin with the first token, or the grammar does.
    maybe = ReasoningTokens(opening, closing, False, 2)
    assert reason(tiny, maybe, logit_bias={opening: -100}) == abc
    found = reason(tiny, maybe, logit_bias={opening: 100, EOS: -100})
    assert (found[0], found[3], found[4:]) == (opening, closing, abc)


def test_the_grammar_may_hold_during_reasoning(make_tiny: Callable[..., LLM]) -> None:
    llm = make_tiny(structured_outputs_config={"enable_in_reasoning": True})
    assert reason(llm, ReasoningTokens(None, 281, True)) == list(b"abc")


# --------------------------------------------------------------------------------- the binding


def test_masks_are_those_of_a_matcher() -> None:
    grammars = Grammars(make_dummy_tokenizer(300), 300, [EOS])
    assert grammars.find("regex", "[ab]c") is None
    grammar = grammars.compile("regex", "[ab]c")
    assert grammars.num_cached == 1
    assert grammars.find("regex", "[ab]c") is not None
    assert grammar.num_bytes > 0
    matcher = Matcher(grammar, 300)
    bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [ord("a"), ord("b")]
    assert not matcher.accept(ord("a"))
    assert not matcher.is_accepting()
    assert matcher.accept(ord("c"))
    with pytest.raises(ValueError, match="stopped"):
        matcher.accept(ord("c"))
    with pytest.raises(ValueError, match="no kind"):
        grammars.compile("magic", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="longer than"):
        Grammars(make_dummy_tokenizer(300), 300, [EOS], deadline_s=0.0).compile("regex", "a")


def test_five_hundred_grammars_in_a_minute_fit_their_memory() -> None:
    """Those of other requests are given up, and compiled again when they are asked for."""
    grammars = Grammars(make_dummy_tokenizer(300), 300, [EOS], max_bytes=16 << 20)
    began_s = time.monotonic()
    sizes = []
    for number in range(500):
        schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}}}
        sizes.append(grammars.compile("json", json.dumps(schema)).num_bytes)
        assert grammars.num_cached * min(sizes) <= 16 << 20
    assert time.monotonic() - began_s < 60
    assert grammars.find("json", json.dumps(schema)) is not None
    assert grammars.find("json", json.dumps({**schema, "properties": {"p0": {}}})) is None
    assert grammars.num_cached < 100
