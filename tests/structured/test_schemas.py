"""Every text that a schema has constrained is valid under it, by an implementation of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import pytest
from random_schemas import random_schema

from octavo.llm import LLM
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams

MAX_TOKENS = 700


def constrained(schema: Any, **params: Any) -> SamplingParams:
    settings = {"max_tokens": MAX_TOKENS, "temperature": 2.0, "seed": 1} | params
    return SamplingParams(**settings, structured_outputs=StructuredOutputsParams(json=schema))


def check(schema: Any, text: str) -> None:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)


def run(llm: LLM, schemas: Sequence[Any], prompts: Sequence[Any], **params: Any) -> None:
    outputs = llm.generate(prompts, [constrained(s, **params) for s in schemas], use_tqdm=False)
    num_whole = check_all(schemas, outputs)
    # A text that runs out of tokens is legal, and no text to validate; few do.
    assert num_whole >= 0.95 * len(schemas)


def check_all(schemas: Sequence[Any], outputs: Sequence[RequestOutput]) -> int:
    num_whole = 0
    for schema, output in zip(schemas, outputs, strict=True):
        [sample] = output.outputs
        if sample.finish_reason == "length":
            assert len(sample.token_ids) == MAX_TOKENS
            continue
        assert sample.finish_reason == "stop"
        try:
            check(schema, sample.text)
        except Exception as error:
            raise AssertionError(f"{json.dumps(schema)}\n{sample.text!r}") from error
        num_whole += 1
    return num_whole


def test_a_random_model_writes_what_the_schemas_say(tiny: LLM) -> None:
    schemas = [random_schema(seed) for seed in range(40)]
    run(tiny, schemas, [f"prompt {seed}" for seed in range(40)])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1600, 100))
def test_a_random_model_writes_what_six_hundred_schemas_say(tiny: LLM, first: int) -> None:
    schemas = [random_schema(seed) for seed in range(first, first + 100)]
    run(tiny, schemas, [f"prompt {seed}" for seed in range(100)])


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "address": {"$ref": "#/$defs/Address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "Address": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "zip": {"type": ["string", "null"], "pattern": "^[0-9]{5}$"},
            },
            "required": ["city", "zip"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_real_model_writes_a_person(smollm2: LLM, temperature: float) -> None:
    question = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
    [output] = smollm2.chat(question, constrained(PERSON, temperature=temperature), use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    check(PERSON, output.outputs[0].text)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(at, marks=pytest.mark.nightly) for at in range(64, 512, 64))]
)
def test_a_real_model_writes_what_five_hundred_schemas_say(smollm2: LLM, first: int) -> None:
    schemas = [random_schema(seed) for seed in range(first, first + 64)]
    prompts = [f"JSON for the schema {json.dumps(schema)[:300]}:\n" for schema in schemas]
    run(smollm2, schemas, prompts, temperature=1.0)


def test_whitespace_and_properties_as_asked_for(tiny: LLM, make_tiny: Callable[..., LLM]) -> None:
    schema: Any = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
        },
        "required": ["a"],
    }
    wanted = StructuredOutputsParams(
        json=schema, disable_any_whitespace=True, disable_additional_properties=True
    )
    params = SamplingParams(temperature=2.0, max_tokens=100, seed=3, n=8, structured_outputs=wanted)
    [output] = tiny.generate("x", params, use_tqdm=False)
    for sample in output.outputs:
        assert json.loads(sample.text).keys() == {"a"}
        assert not set(sample.text) & set(" \n\t\r")
    # The same by the server's own settings.
    llm = make_tiny(
        structured_outputs_config={
            "disable_any_whitespace": True,
            "disable_additional_properties": True,
            "backend": "xgrammar",
        }
    )
    params = SamplingParams(
        temperature=2.0,
        max_tokens=100,
        seed=3,
        n=8,
        structured_outputs=StructuredOutputsParams(json=schema),
    )
    [other] = llm.generate("x", params, use_tqdm=False)
    assert [s.text for s in other.outputs] == [s.text for s in output.outputs]
