"""call_grammar.py: what a request's calls have to follow, and what becomes of schemas that cannot be."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from octavo._core import ChannelFormat, tool_call_formats
from octavo.errors import InvalidParameterError
from octavo.structured_outputs import StructuredOutputsParams, Trigger
from octavo.text.call_grammar import answer_constraint, call_grammar
from octavo.text.tools import parse_tool_use, parse_tools

PARAMETERS = {
    "type": "object",
    "properties": {
        "zone": {"type": "string"},
        "more": {"type": "object", "properties": {"deep": {"type": "integer"}}},
        "open": {"type": "object", "properties": {}, "additionalProperties": True},
    },
}


# Formats in which calls have no marker, or one that text has, too.
BARE = {"llama3_json", "llama4_pythonic", "pythonic", "xlam", "functionary_v3"}


def use(choice: Any = "required", *, strict: bool = False, parallel: bool = True) -> Any:
    def tool(name: str, is_strict: bool) -> dict[str, Any]:
        function = {"name": name, "parameters": PARAMETERS, "strict": is_strict}
        return {"type": "function", "function": function}

    tools = parse_tools("tools", [tool("clock", strict), tool("now", False)])
    return parse_tool_use(tools, choice, parallel)


def grammar(wanted: Any, refused: tuple[str, ...] = ()) -> str:
    async def attempt(constraint: StructuredOutputsParams) -> None:
        if any(one in constraint.text for one in refused):
            raise InvalidParameterError("no", constraint.param)

    made = asyncio.run(call_grammar(ChannelFormat("hermes"), wanted, (), attempt))
    assert made.grammar is not None
    return made.grammar


def constraint(
    name: str, wanted: Any, own: StructuredOutputsParams | None = None
) -> StructuredOutputsParams | None:
    async def attempt(constraint: StructuredOutputsParams) -> None:
        pass

    core = ChannelFormat(name)
    return asyncio.run(answer_constraint(core, wanted, (), attempt, own))


@pytest.mark.parametrize(
    ("wanted", "bound"),
    [
        (use("auto"), True),
        (use("none", strict=True), False),
        (use("auto", strict=True), True),
        (use("auto", parallel=False), True),
        (use("required"), True),
        (parse_tool_use((), "auto", False), False),
    ],
)
def test_what_may_call_is_bound(wanted: Any, bound: bool) -> None:
    assert (constraint("hermes", wanted) is not None) is bound


def test_an_answer_of_its_own_form_has_no_calls() -> None:
    """What the request asks for is never dropped."""
    regex = StructuredOutputsParams(regex="[a-z]+")
    assert constraint("hermes", use("auto"), regex) is None
    assert constraint("hermes", use("auto", strict=True), regex) is None
    schema = constraint("hermes", use("auto"), StructuredOutputsParams(json={"type": "null"}))
    assert schema is not None
    assert schema.text.endswith('answer: %json {"type":"null"}\n')
    # Calls that must come are no text of any other form.
    called = constraint("hermes", use("required"), regex)
    assert called is not None
    assert "clock" in called.text


@pytest.mark.parametrize("name", tool_call_formats())
def test_with_auto_a_call_is_bound_from_its_marker_on(name: str) -> None:
    core = ChannelFormat(name)
    assert core.is_bare is (name in BARE)
    texts, at_start = core.triggers(["clock", "now"])
    assert texts or at_start
    # What text may begin with, too, is a call only once a tool is named.
    assert bool(at_start) is (name in BARE)
    assert all("clock" in text or "now" in text for text in at_start)
    for wanted, is_repeated in ((use("auto"), True), (use("auto", parallel=False), False)):
        made = constraint(name, wanted)
        assert made is not None
        assert "clock" in made.text
        expected = Trigger(tuple(texts), is_repeated, tuple(at_start))
        assert made.trigger == (None if core.is_bare and not is_repeated else expected)
    # What has to begin with a call, or to be a JSON object otherwise, is bound from the start.
    required = constraint(name, use("required"))
    answer = constraint(name, use("auto"), StructuredOutputsParams(json={}))
    strict = constraint(name, use("auto", strict=True))
    assert required is not None
    assert answer is not None
    assert strict is not None
    assert (required.trigger, answer.trigger) == (None, None)
    assert (strict.trigger is None) is core.is_bare


def test_objects_hold_what_their_schema_names() -> None:
    text = grammar(use())
    assert text.count('"additionalProperties":false') == 4
    assert text.count('"additionalProperties":true') == 2
    assert '"key_separator":": ?"' in text


@pytest.mark.parametrize("name", tool_call_formats())
def test_an_answer_of_a_schema_stands_beside_calls(name: str) -> None:
    """Agents ask for objects and bring tools at once."""

    async def attempt(constraint: StructuredOutputsParams) -> None:
        made.append(constraint.text)

    made: list[str] = []
    answer = '{"type": "object", "title": "start: x"}'
    core = ChannelFormat(name)
    asyncio.run(call_grammar(core, use("auto"), (), attempt, answer))
    [text] = made
    assert text.endswith(f"| answer\nanswer: %json {answer}\n")
    assert text.count("\nstart: ") + text.startswith("start: ") == 1
    # Without a schema for it an answer is any text; where a call must come there is none.
    made.clear()
    asyncio.run(call_grammar(core, use("required"), (), attempt, answer))
    assert "answer: " not in made[0]


def test_with_auto_strict_tools_alone_follow_their_schema() -> None:
    assert grammar(use("auto", strict=True)).count('"zone"') == 1
    assert grammar(use("auto", parallel=False)).count('"zone"') == 0
    assert grammar(use("required")).count('"zone"') == 2


def test_a_schema_is_followed_as_far_as_it_can_be(caplog: pytest.LogCaptureFixture) -> None:
    text = grammar(use(), refused=('"lenient":', '"zone"'))
    assert '"zone"' not in text
    assert "clock" in text
    assert len(caplog.records) == 4
    caplog.clear()
    # Only its other keywords are in the way.
    text = grammar(use(), refused=('": ?"}}',))
    assert text.count('"lenient":true') == 2
    assert '"zone"' in text


def test_a_name_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        grammar(use(), refused=("clock",))
    assert caught.value.param == "tools"


def test_shared_parts_of_a_schema_stay_open() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"type": "object", "properties": {"b": {}}, "allOf": [{"properties": {}}]}},
    }
    function = {"name": "f", "parameters": parameters}
    tools = parse_tools("tools", [{"type": "function", "function": function}])
    text = grammar(parse_tool_use(tools, "required"))
    line = next(line for line in text.splitlines() if "%json" in line)
    schema = json.JSONDecoder().raw_decode(line.partition("%json ")[2])[0]
    assert schema["additionalProperties"] is False
    assert "additionalProperties" not in schema["$defs"]["a"]
