"""Conversations with calls, for templates that insist on more than clients send."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import BadRequestError
from octavo.text.chat_template import ChatTemplate

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def call(number: int, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": "{}"}
    return {"id": f"call_{number}", "type": "function", "function": function}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": f"r{number}"}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "s", "tool_calls": [call(1, "clock"), call(2, "now")]},
    result(2),
    result(1),
    {"role": "assistant", "content": "a"},
]
WRITTEN = """{%- for m in messages %}[{{ m.role }}{{ ' ' ~ m.name if m.name }} {{ m.content }}
{%- for c in m.tool_calls or [] %} {{ c.function.name }}{% endfor %}]{% endfor %}{{ tools and '' }}"""
NAMED = "{% for m in messages if m.role == 'tool' %}{{ '' + m.name and '' }}{% endfor %}"
SINGLE = """{% for m in messages if (m.tool_calls or []) | length > 1 -%}
{{ raise_exception('one at a time') }}{% endfor %}"""


@pytest.mark.parametrize(
    ("insists", "text"),
    [
        ("", "[user q][assistant s clock now][tool r2][tool r1][assistant a]"),
        (NAMED, "[user q][assistant s clock now][tool now r2][tool clock r1][assistant a]"),
        (
            SINGLE,
            "[user q][assistant s clock][tool clock r1][assistant  now][tool now r2][assistant a]",
        ),
    ],
    ids=["nothing", "names", "single calls"],
)
def test_a_template_gets_what_it_insists_on_and_no_more(insists: str, text: str) -> None:
    assert ChatTemplate(insists + WRITTEN, {}).render(MESSAGES, tools=TOOLS) == text


def test_the_first_failure_is_told() -> None:
    source = WRITTEN + "{% if messages[1].tool_calls | length > 1 %}{{ raise_exception('two') }}"
    source += "{% else %}{{ raise_exception('one') }}{% endif %}"
    with pytest.raises(BadRequestError, match="two"):
        ChatTemplate(source, {}).render(MESSAGES, tools=TOOLS)
