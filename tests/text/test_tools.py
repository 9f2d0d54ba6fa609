"""tools.py and tool_prompt.py: every bad tool is named, and tools reach templates that know none."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.text import tools as tools_module
from octavo.text.chat_template import ChatTemplate
from octavo.text.tools import ToolUse, call_id, parse_tool_use, parse_tools

SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}}}


def tool(name: str = "clock", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def test_a_template_gets_the_keys_in_the_order_models_know() -> None:
    given = {
        "function": {"strict": True, "parameters": SCHEMA, "x": 1, "description": "D", "name": "f"},
        "type": "function",
    }
    [one] = parse_tools("tools", [given])
    assert json.dumps(one.definition) == json.dumps(
        {
            "type": "function",
            "function": {"name": "f", "description": "D", "parameters": SCHEMA, "x": 1},
        }
    )
    assert one.strict
    assert json.loads(one.schema) == SCHEMA


def test_a_function_without_parameters_takes_an_empty_object() -> None:
    [one] = parse_tools("tools", [{"function": {"name": "f"}}])
    assert json.loads(one.schema) == {"type": "object", "properties": {}}
    assert "description" not in one.definition["function"]
    assert not one.strict


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("clock", "tools"),
        ({}, "tools"),
        ([1], "tools[0]"),
        ([tool(), {"type": "function"}], "tools[1].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([tool("")], "tools[0].function.name"),
        ([tool("x" * 257)], "tools[0].function.name"),
        ([tool(description=3)], "tools[0].function.description"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(parameters={"x": "y" * 300_000})], "tools[0].function.parameters"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(str(i)) for i in range(1025)], "tools"),
    ],
)
def test_a_bad_tool_is_named(value: Any, field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_tools("tools", value)
    assert caught.value.param == field
    assert len(str(caught.value)) < 300


def test_many_large_tools_are_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "MAX_TOOLS_CHARS", 150)
    with pytest.raises(InvalidParameterError, match="at most 150 characters") as caught:
        parse_tools("tools", [tool("a"), tool("b"), tool("c")])
    assert caught.value.param == "tools"


def test_tools_that_are_no_functions_are_refused() -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        parse_tools("tools", [{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"


NAMED = {"type": "function", "function": {"name": "b"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        (None, "auto", "abc"),
        ("auto", "auto", "abc"),
        ("none", "none", "abc"),
        ("required", "required", "abc"),
        (NAMED, "named", "b"),
        (ALLOWED, "required", "b"),
        ({**ALLOWED, "allowed_tools": {"tools": [{"name": "c"}, NAMED]}}, "auto", "bc"),
    ],
)
def test_a_choice_of_tools(choice: Any, mode: str, names: str) -> None:
    use = parse_tool_use(parse_tools("tools", [tool(name) for name in "abc"]), choice)
    assert (use.mode, "".join(one.name for one in use.tools)) == (mode, names)
    assert [name for name, _ in use.signatures] == list(names)
    assert len(use.definitions) == len(names)


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ("any", "tool_choice"),
        (7, "tool_choice"),
        ({}, "tool_choice"),
        ({"type": "function", "function": {"name": "z"}}, "tool_choice.function.name"),
        ({"type": "function", "function": {}}, "tool_choice"),
        ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "some", "tools": [NAMED]}},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"tools": []}},
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"tools": [NAMED, {"name": 1}]}},
            "tool_choice.allowed_tools.tools[1]",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": "z"}]}},
            "tool_choice.allowed_tools.tools",
        ),
    ],
)
def test_a_bad_choice_is_named(choice: Any, field: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_tool_use(parse_tools("tools", [tool(name) for name in "abc"]), choice)
    assert caught.value.param == field


def test_the_first_of_several_tools_of_a_name_counts() -> None:
    use = parse_tool_use(parse_tools("tools", [tool("f", parameters={"a": 1}), tool("f")]))
    assert use.signatures == [("f", '{"a": 1}')]
    assert len(use.definitions) == 2


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_choice_that_needs_tools(choice: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_tool_use((), choice)
    assert str(caught.value.param).startswith("tool_choice")


def test_ids_have_the_form_that_the_format_needs() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", call_id("hermes", "f", 0, "given"))
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", call_id("mistral", "f", 0))
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", call_id("mistral_array", "f", 0, "too long an id"))
    assert call_id("mistral", "f", 0, "abcDEF123") == "abcDEF123"
    assert call_id("kimi_k2", "f", 3) == "functions.f:3"
    assert call_id("kimi_k2", "f", 3, "functions.f:7") == "functions.f:7"
    assert call_id("hermes", "f", 0) != call_id("hermes", "f", 0)


# ------------------------------------------------------- templates that know no tools

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
USER = {"role": "user", "content": "What time is it?"}
TOOLS = [one.definition for one in parse_tools("tools", [tool(description="Zürich"), tool("f")])]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_are_described_in_the_system_text() -> None:
    template = ChatTemplate(CHATML, {})
    text = template.render([{"role": "system", "content": "Be brief."}, USER], tools=TOOLS)
    assert text.startswith("<system>Be brief.\n\n")
    assert text.endswith("</system><user>What time is it?</user><assistant>")
    for one in TOOLS:
        assert json.dumps(one["function"], ensure_ascii=False) in text
    assert "<tool_call>" in text
    assert template.render([USER], tools=TOOLS).startswith("<system>You can call functions.")


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_nothing_is_said(tools: Any) -> None:
    assert ChatTemplate(CHATML, {}).render([USER], tools=tools) == (
        "<user>What time is it?</user><assistant>"
    )


def test_a_template_without_a_system_has_them_in_the_users_text() -> None:
    template = ChatTemplate(NO_SYSTEM + CHATML, {})
    text = template.render([USER], tools=TOOLS)
    assert text.startswith("<user>You can call functions.")
    assert text.endswith("\n\nWhat time is it?</user><assistant>")


def test_earlier_calls_and_results_become_text() -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call("clock", '{"zone": "Zürich"}'), call("f", {})],
        },
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "13:00"}]},
        {"role": "assistant", "content": "Noon, or one."},
    ]
    before = json.dumps(messages)
    text = ChatTemplate(CHATML, {}).render(messages)
    assert text == (
        "<user>What time is it?</user>"
        '<assistant><tool_call>\n{"name": "clock", "arguments": {"zone": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call></assistant>'
        "<user><tool_response>\n12:00\n</tool_response>\n"
        "<tool_response>\n13:00\n</tool_response></user>"
        "<assistant>Noon, or one.</assistant><assistant>"
    )
    assert json.dumps(messages) == before, "the caller's messages stay as they are"


def test_reasoning_reaches_a_template_under_every_name() -> None:
    names = ("reasoning", "reasoning_content", "thinking")
    source = (
        "{% for m in messages %}" + "".join(f"[{{{{ m.{n} }}}}]" for n in names) + "{% endfor %}"
    )
    template = ChatTemplate(source, {})
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "because"}
        assert template.render([message]) == "[because][because][because]"


def test_what_is_null_is_absent() -> None:
    function = {"name": "f", "description": None, "parameters": None, "strict": None, "x": None}
    use = ToolUse(parse_tools("tools", [{"type": None, "function": function}]))
    assert use.definitions == [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    assert use.num_chars == len(use.tools[0].schema)
