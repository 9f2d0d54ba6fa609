"""Templates out of requests: rendered like any other, and what they cost ends with their process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.errors import BadRequestError, UnsupportedParameterError
from octavo.text import template_process
from octavo.text.chat_template import ChatTemplate
from octavo.text.template_process import RequestTemplate, TemplateProcess

MESSAGES = [{"role": "user", "content": "Hello"}]
DOUBLING = "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
GROWING = "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
# What neither a deadline in loops nor a bound on operators sees.
ENDLESS = {
    "a global": "{{ lipsum(10000000) }}",
    "shared lists as text": "{% set ns = namespace(l=[1]) %}" + DOUBLING + "{{ ns.l }}",
    "shared lists as JSON": "{% set ns = namespace(l=[1]) %}" + DOUBLING + "{{ ns.l|tojson }}",
    "a filter": "{{ range(99999)|select('in', range(99999)|list)|list|length }}",
    "many constants": "{{ [" + "1," * 100_000 + "]|length }}",
}
LARGE = {
    "a format": "{{ '{:>1000000000}'.format('a') }}",
    "a block": "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
    + GROWING
    + "{% endfor %}{{ ns.s|length }}",
}


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def render(process: TemplateProcess, source: str, **variables: Any) -> str:
    return RequestTemplate(source, {"bos_token": "<s>"}, process).render(MESSAGES, **variables)


def test_the_text_is_that_of_any_template(process: TemplateProcess) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}{{ style }}{{ documents|length }}"
    )
    variables: dict[str, Any] = {"style": "é🦊", "documents": [{"text": "x"}]}
    expected = ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, **variables)
    assert render(process, source, **variables) == expected
    assert "[assistant]é🦊1" in expected


def test_errors_are_those_of_any_template(process: TemplateProcess) -> None:
    with pytest.raises(BadRequestError, match="line 1") as caught:
        render(process, "{% for %}")
    assert caught.value.param == "chat_template"
    with pytest.raises(BadRequestError, match="roles must alternate") as caught:
        render(process, "{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    with pytest.raises(BadRequestError, match="nests too deeply"):
        render(process, "{% if 0 %}" + "{% elif 1 %}" * 9000 + "{% endif %}")
    with pytest.raises(UnsupportedParameterError, match="documents is not supported"):
        render(process, "{{ messages[0].content }}", documents=[{"text": "x"}])


@pytest.mark.parametrize("name", ENDLESS)
def test_what_takes_too_long_is_ended(
    process: TemplateProcess, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(process, "{{ messages[0].content }}") == "Hello"
    monkeypatch.setattr(template_process, "MAX_ANSWER_S", 0.2)
    began = time.monotonic()
    with pytest.raises(BadRequestError, match="takes too long"):
        render(process, ENDLESS[name])
    assert time.monotonic() - began < 3
    monkeypatch.undo()
    assert render(process, "{{ messages[0].content }}") == "Hello"


@pytest.mark.parametrize("name", LARGE)
def test_what_needs_too_much_memory_is_ended(process: TemplateProcess, name: str) -> None:
    with pytest.raises(BadRequestError, match="needs too much memory"):
        render(process, LARGE[name])
    assert render(process, "{{ messages[0].content }}") == "Hello"


def test_the_process_has_none_of_the_server_s_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    process = TemplateProcess()
    assert render(process, "{{ messages[0].content }}") == "Hello"
    assert process._child is not None
    with open(f"/proc/{process._child.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    child = process._child
    process.close()
    assert child.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
