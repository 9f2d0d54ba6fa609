"""Schemas of agents' tools, with all that their authors put in them: none is refused, and a call that
must come is of a tool that there is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from octavo._core import ChannelFormat
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams
from octavo.text.call_grammar import answer_constraint
from octavo.text.tools import parse_tool_use, parse_tools

# By what is in it: the schema of one argument, and whether a grammar can follow it as it stands.
ARGUMENTS: dict[str, tuple[dict[str, Any], bool]] = {
    "digits": ({"type": "string", "pattern": r"^\d{2}-\w$"}, True),
    "look-around": ({"type": "string", "pattern": r"^(?!x)(?=.*\d).*$"}, False),
    "a back-reference": ({"type": "string", "pattern": r"^(a|b)\1$"}, False),
    "a broken pattern": ({"type": "string", "pattern": "("}, False),
    "a union of two hundred": (
        {
            "anyOf": [
                {"type": "object", "properties": {f"k{i}": {"const": i}}, "required": [f"k{i}"]}
                for i in range(200)
            ]
        },
        True,
    ),
    "options that overlap": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, False),
    "a thousand words": ({"enum": [f"word {i}" for i in range(1000)]}, True),
    "not": ({"type": "string", "not": {"const": ""}}, False),
    "if": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, False),
    "names of properties": ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, False),
    "a format of no standard": ({"type": "string", "format": "int32"}, False),
    "a format that is not followed": ({"type": "string", "format": "uri-reference"}, False),
    "a reference out of it": ({"$ref": "https://example.org/schema"}, False),
    "a reference to nothing": ({"$ref": "#/$defs/nothing"}, False),
    "bounds that nothing fits": ({"type": "integer", "minimum": 3, "maximum": 2}, False),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_a_call_of_any_schema_can_be_made(
    tiny: LLM, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    schema, is_followed = ARGUMENTS[what]
    parameters = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"one": schema},
        "required": ["one"],
        "additionalProperties": False,
    }
    function = {"name": "do_it", "description": "Do.", "parameters": parameters}
    tools = parse_tools("tools", [{"type": "function", "function": function}])
    wanted = parse_tool_use(tools, "required")

    async def attempt(constraint: StructuredOutputsParams) -> object:
        return tiny._engine.grammars.compile(SamplingParams(structured_outputs=constraint))

    constraint = asyncio.run(answer_constraint(ChannelFormat("hermes"), wanted, (), attempt))
    assert constraint is not None
    warned = any("its schema is not followed" in one.message for one in caplog.records)
    assert warned is not is_followed
    params = SamplingParams(
        temperature=2, seed=1, max_tokens=60, structured_outputs=constraint, n=2
    )
    [output] = tiny.generate(["x"], params, use_tqdm=False)
    for sample in output.outputs:
        head = json.dumps({"name": "do_it", "arguments": {}})[:-2]
        text = sample.text.removeprefix("<tool_call>").lstrip()
        assert head.startswith(text[: len(head)])
        assert len(text) > 20
