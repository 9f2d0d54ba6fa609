"""chat_template.py: the same bytes as transformers, and bounds that hold."""

from __future__ import annotations

import time
from typing import Any

import pytest

from octavo.errors import BadRequestError
from octavo.text import chat_template
from octavo.text.chat_template import ChatTemplate

CHATML = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA3 = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {% set content = header + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message["role"] not in ("user", "assistant") %}{% continue %}{% endif %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}{{- " " + message["content"] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

TOOLS = """\
{%- macro header(role) -%}<|{{ role }}|>{%- endmacro -%}
{{ strftime_now("%Y") }}
{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}
{% for m in messages %}{{ header(m.role) }}{{ m.content }}
{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})
{% endfor %}{% endfor %}
"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
HELLO = {"role": "user", "content": "  Hello, \"world\" 'é' \n"}
ANSWER = {"role": "assistant", "content": "Hi "}
CONVERSATIONS = [
    [HELLO],
    [SYSTEM, HELLO],
    [SYSTEM, HELLO, ANSWER, {"role": "user", "content": "And?"}],
]


def transformers_render(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template([messages], chat_template=template, **kwargs)
    return str(rendered[0])


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, TOOLS])
@pytest.mark.parametrize("generate", [True, False])
def test_same_bytes_as_transformers(
    template: str, messages: list[dict[str, Any]], generate: bool
) -> None:
    expected = transformers_render(template, messages, add_generation_prompt=generate, **SPECIAL)
    actual = ChatTemplate(template, SPECIAL).render(messages, add_generation_prompt=generate)
    assert actual == expected


def test_tools_are_written_as_transformers_writes_them() -> None:
    tools = [{"type": "function", "function": {"name": "f<", "parameters": {"é": [1, None]}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    messages = [HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = transformers_render(TOOLS, messages, tools=tools)
    as_text = {**call, "function": {"name": "f", "arguments": '{"a": "ü"}'}}
    sent = [HELLO, {"role": "assistant", "content": None, "tool_calls": [as_text]}]
    assert (
        ChatTemplate(TOOLS, {}).render(sent, tools=tools, add_generation_prompt=False) == expected
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL])
@pytest.mark.parametrize("end", ["Once upon", "Once upon ", "Once upon a time.\n"])
def test_a_continued_message_ends_where_transformers_ends_it(template: str, end: str) -> None:
    messages = [HELLO, {"role": "assistant", "content": end}]
    expected = transformers_render(template, messages, continue_final_message=True, **SPECIAL)
    actual = ChatTemplate(template, SPECIAL).render(
        messages, continue_final_message=True, add_generation_prompt=False
    )
    assert actual == expected


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = ChatTemplate(CHATML, {}).render([{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in text


def test_developer_becomes_system_where_the_template_does_not_know_it() -> None:
    messages = [{"role": "developer", "content": "Short."}, HELLO]
    assert "<|im_start|>system\nShort." in ChatTemplate(CHATML, {}).render(messages)
    knowing = "{% for m in messages %}{{ m.role }} {% endfor %}{# developer #}"
    assert ChatTemplate(knowing, {}).render(messages) == "developer user "


def test_the_template_s_own_refusal_is_the_message() -> None:
    with pytest.raises(BadRequestError, match="roles must alternate"):
        ChatTemplate(MISTRAL, SPECIAL).render([HELLO, HELLO])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_failures_inside_a_template_are_the_request_s(template: str) -> None:
    with pytest.raises(BadRequestError):
        ChatTemplate(template, {}).render([HELLO])


def test_a_bad_template_names_its_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("ok\n{% if %}", {})


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
        "{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_templates_are_cut_off(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.1)
    began = time.monotonic()
    with pytest.raises(BadRequestError, match="too long"):
        ChatTemplate(template, {}).render([HELLO])
    assert time.monotonic() - began < 5


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(BadRequestError, match="too much"):
        ChatTemplate("{% for i in range(500) %}abc{% endfor %}", {}).render([HELLO])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format('') }}",
        "{{ 'a'.center(1000000000) }}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ messages | tojson(indent=1000000000) }}",
    ],
)
def test_a_request_s_template_cannot_fill_memory(template: str) -> None:
    with pytest.raises((BadRequestError, ValueError)):
        ChatTemplate(template, {}, untrusted=True).render([HELLO])


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_a_request_s_template_renders_the_same(template: str) -> None:
    trusted = ChatTemplate(template, SPECIAL).render(CONVERSATIONS[2])
    untrusted = ChatTemplate(template, SPECIAL, untrusted=True).render(CONVERSATIONS[2])
    assert untrusted == trusted


def test_it_knows_the_variables_it_uses() -> None:
    template = ChatTemplate("{% if enable_thinking %}x{% endif %}{{ messages[0].content }}", {})
    assert template.uses("enable_thinking")
    assert not template.uses("reasoning_effort")
    assert template.render([{"role": "user", "content": "y"}], enable_thinking=True) == "xy"


# --------------------------------------------------------- the forms a template is written for


def user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


PARTS_ONLY = """\
{%- for m in messages -%}<{{ m.role }}>
{%- set body = m['content'] -%}
{%- for piece in body if piece.type == 'text' -%}{{ piece['text'] | trim }}{%- endfor -%}
</{{ m.role }}>{%- endfor -%}
"""
EITHER = """\
{%- for m in messages -%}<{{ m.role }}>
{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for piece in m.content -%}{{ piece.text }}|{%- endfor -%}
{%- endif -%}</{{ m.role }}>{%- endfor -%}
"""
MACRO = """\
{%- macro write(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is iterable -%}{%- for p in content -%}{{ p.text }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- for m in messages -%}[{{ write(m.content) }}]{%- endfor -%}
"""
SYSTEM_AS_TEXT = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ 'S:' + m.content }}
{%- else -%}{%- for p in m.content -%}{{ m.role[0] }}:{{ p.text }};{%- endfor -%}{%- endif -%}
{%- endfor -%}
"""
CAREFUL = """\
{%- if messages[0].role != 'system' -%}{{ raise_exception('a rule first') }}{%- endif -%}
{%- for m in messages -%}{%- for p in m.content -%}{{ p.text }}{%- endfor -%}/{%- endfor -%}
"""


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (PARTS_ONLY, [user("one", "two")], "<user>onetwo</user>"),
        (PARTS_ONLY, [{"role": "user", "content": "one"}], "<user>one</user>"),
        (EITHER, [user("one", "two")], "<user>one|two|</user>"),
        (EITHER, [{"role": "user", "content": "one"}], "<user>one</user>"),
        (MACRO, [user("one", "two"), ANSWER], "[onetwo][Hi ]"),
        (SYSTEM_AS_TEXT, [SYSTEM, user("a", "b"), ANSWER], "S:Be brief & <kind>.u:a;u:b;a:Hi ;"),
        (
            SYSTEM_AS_TEXT,
            [{"role": "system", "content": user("x", "y")["content"]}, user("a")],
            "S:x\nyu:a;",
        ),
        (CAREFUL, [SYSTEM, user("a", "b"), {"role": "critic", "content": "c"}],
         "Be brief & <kind>./ab/c/"),
        (CHATML, [{"role": "assistant", "content": user("a")["content"]}],
         "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"),
    ],
)  # fmt: skip
def test_content_comes_in_the_form_that_the_template_writes(
    template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    actual = ChatTemplate(template, {}).render(messages, add_generation_prompt=False)
    assert actual == expected


def test_a_template_that_answers_no_question_is_known_by_its_syntax() -> None:
    refusing = "{% if messages | length != 4 %}{{ raise_exception('four') }}{% endif %}"
    parts = ChatTemplate(refusing + "{% set c = messages[0].content | list %}"
                         "{% for p in c %}{{ p.text }}{% endfor %}", {})  # fmt: skip
    assert parts.render([HELLO] * 4) == HELLO["content"]
    text = ChatTemplate(refusing + "{{ messages[0].content }}", {})
    assert text.render([user("one")] * 4) == "one"


@pytest.mark.parametrize("take", [".text", "['text']"])
def test_parts_that_are_named_by_number(take: str) -> None:
    source = "{% for m in messages %}{{ m.content[0]" + take + " }};{% endfor %}"
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert ChatTemplate(source, {}).render([HELLO, parts]) == f"{HELLO['content']};a;"
    # A text has characters, too.
    first = ChatTemplate("{{ messages[0].content[0] }}", {})
    assert first.render([HELLO]) == HELLO["content"][0]


def test_a_continued_message_of_parts() -> None:
    answer = {"role": "assistant", "content": user("Once", " upon")["content"]}
    for template, end in ((PARTS_ONLY, "Onceupon"), (EITHER, "Once| upon")):
        text = ChatTemplate(template, {}).render(
            [user("hi"), answer], continue_final_message=True, add_generation_prompt=False
        )
        assert text.endswith(f"<assistant>{end}")


ASKS_NONE = """\
{%- for m in messages -%}
{%- if m.content is none -%}(nothing){%- else -%}({{ m.content }}){%- endif -%}
{%- for call in m.tool_calls or [] -%}{{ call.function.name }}{%- endfor -%}
{%- endfor -%}
"""
ASKS_NONE_OF_CALLS = """\
{%- for m in messages -%}
{%- if m.tool_calls -%}{{ '' if m.content is not none else 'quiet:' }}call
{%- else -%}{{ m.content }}{%- endif -%};{%- endfor -%}
"""


def call(arguments: Any, name: str = "clock") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def test_null_content_stays_null_where_the_template_asks() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [call("{}")]}
    silent = {"role": "assistant", "content": None, "reasoning": "hm"}
    asks = ChatTemplate(ASKS_NONE, {})
    assert asks.render([HELLO, calling], add_generation_prompt=False).endswith("(nothing)clock")
    assert asks.render([silent]) == "(nothing)"
    of_calls = ChatTemplate(ASKS_NONE_OF_CALLS, {})
    assert of_calls.render([calling, silent, calling]) == "quiet:call;;quiet:call;"
    # Here null would be printed, or would fail.
    for template in ("{{ messages[0].content }}.", "{{ messages[0].content + '.' }}",
                     "{{ messages[0].content | trim }}."):  # fmt: skip
        assert ChatTemplate(template, {}).render([silent]) == "."


JOINED_TO_TEXT = "{{ c.name + '(' + c.arguments + ')' }}"
AS_JSON = "{{ c.name }}{{ c.arguments | tojson }}"
OVER_ITEMS = "{{ c.name }}{% for k, v in c.arguments.items() %} {{ k }}={{ v }}{% endfor %}"
PRINTED = "{{ c.name }} {{ c.arguments }}"
NAMELESS = "{% if c.arguments is string %}<{{ c.arguments }}>{% endif %}"
IF_MAPPING = "{% if c.arguments is mapping %}{{ c.name }}{{ c.arguments | tojson }}{% endif %}"
IF_STRING = "{% if c.arguments is string %}{{ c.name }}{{ c.arguments }}{% endif %}"
EITHER_WAY = (
    "{{ c.name }}{% if c.arguments is string %}{{ c.arguments }}{% else %}"
    "{{ c.arguments | tojson }}{% endif %}"
)


@pytest.mark.parametrize(
    ("write", "from_text", "from_object"),
    [
        (JOINED_TO_TEXT, 'clock({"zone":  "Zürich"})', 'clock({"zone": "Zürich"})'),
        (PRINTED, 'clock {"zone":  "Zürich"}', 'clock {"zone": "Zürich"}'),
        (IF_STRING, 'clock{"zone":  "Zürich"}', 'clock{"zone": "Zürich"}'),
        (NAMELESS, '<{"zone":  "Zürich"}>', '<{"zone": "Zürich"}>'),
        (AS_JSON, 'clock{"zone": "Zürich"}', 'clock{"zone": "Zürich"}'),
        (OVER_ITEMS, "clock zone=Zürich", "clock zone=Zürich"),
        (IF_MAPPING, 'clock{"zone": "Zürich"}', 'clock{"zone": "Zürich"}'),
        (EITHER_WAY, 'clock{"zone": "Zürich"}', 'clock{"zone": "Zürich"}'),
    ],
)
@pytest.mark.parametrize("guard", ["", "tools and "])
def test_arguments_come_in_the_form_that_the_template_writes(
    write: str, from_text: str, from_object: str, guard: str
) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if " + guard + "m.tool_calls %}{% for t in m.tool_calls %}"
        "{% set c = t.function %}" + write + "{% endfor %}{% else %}-{% endif %}{% endfor %}",
        {},
    )
    for arguments, expected in (
        ('{"zone":  "Zürich"}', from_text),
        ({"zone": "Zürich"}, from_object),
    ):
        message = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
        tools = [{"type": "function", "function": {"name": "clock"}}]
        # The tools are described in a system's message where the template does not do it.
        others = "-" if guard else "--"
        assert template.render([HELLO, message], tools=tools) == others + expected


def test_arguments_that_are_no_json_go_where_text_goes() -> None:
    """A model's own broken call, played back."""
    message = {"role": "assistant", "content": "", "tool_calls": [call('{"zone": ')]}
    loop = "{% for m in messages %}{% set c = m.tool_calls[0].function %}"
    for write, expected in ((JOINED_TO_TEXT, 'clock({"zone": )'), (AS_JSON, r'"{\"zone\": "')):
        text = ChatTemplate(loop + write + "{% endfor %}", {}).render([message])
        assert text.endswith(expected)
    with pytest.raises(BadRequestError, match="no attribute 'items'"):
        ChatTemplate(loop + OVER_ITEMS + "{% endfor %}", {}).render([message])


def test_questions_take_no_longer_than_a_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    began = time.monotonic()
    ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                 {}, untrusted=True)  # fmt: skip
    assert time.monotonic() - began < 3
