"""TemplateProbe: what a chat template writes around calls and reasoning, found by rendering.

A template holds the form in which its model was trained to call tools and to reason, because it
writes earlier turns in that form. Small conversations that differ in one thing are rendered, and
what they differ in is looked at (the idea is llama.cpp's "autoparser"). One load asks about twenty
questions, each of which takes a fraction of a millisecond.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from octavo.errors import BadRequestError
from octavo.text.chat_template import ChatTemplate

# Words that no template holds, and that no format changes.
NAME: Final = "octavo_probe_function"
KEY: Final = "octavo_probe_key"
_VALUES: Final = ("octavoprobeone", "octavoprobetwo")
_THOUGHT, _ANSWER = "octavoprobethought", "octavoprobeanswer"
# Mistral's templates insist on nine characters, Kimi's on the function's name.
_CALL_IDS: Final = ("octavo000", "octavo001")

_PROPERTY: Final = {"type": "string", "description": "Probe."}
SCHEMA: Final = json.dumps({"type": "object", "properties": {KEY: _PROPERTY}, "required": [KEY]})
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {"name": NAME, "description": "Probe.", "parameters": json.loads(SCHEMA)},
    }
]
_QUESTION: Final[dict[str, Any]] = {"role": "user", "content": "question"}

# Variables by which templates switch reasoning, and their values for off and on.
TOGGLES: Final = ("enable_thinking", "thinking", "think", "reasoning", "enable_reasoning")

# What a marker of reasoning looks like: a tag, a word in brackets, a special token.
_BEFORE: Final = re.compile(r"(<\|?[^<>\s]{1,40}>|\[[A-Z_]{2,30}\]|◁[^◁▷\s]{1,30}▷)\s*$")
_AFTER: Final = re.compile(r"\s*(<\|?/?[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]|◁/?[^◁▷\s]{1,30}▷)")
_OPEN: Final = re.compile(r"<\|?[^<>]{1,40}$")


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls as a template writes them.

    Args:
        text: the turn that holds them.
        arguments: of each call.
        plain: a turn that holds none.
    """

    text: str
    arguments: tuple[dict[str, str], ...]
    plain: str


class TemplateProbe:
    """Questions to one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def calls(self) -> list[Calls]:
        """A turn with one call, and one with two; without those that the template refuses."""
        prompt = self._render([_QUESTION], TOOLS, add_generation_prompt=True)
        if prompt is None:
            return []
        plain = self._render([_QUESTION, {"role": "assistant", "content": _ANSWER}], TOOLS) or ""
        plain_turn = plain[_common_length(plain, prompt) :]
        found = []
        for count in (1, 2):
            arguments = tuple({KEY: value} for value in _VALUES[:count])
            for message in _calling(arguments):
                text = self._render([_QUESTION, message], TOOLS)
                if text is not None and all(value in text for value in _VALUES[:count]):
                    text = text[_common_length(text, prompt) :]
                    if NAME not in text:
                        # Written as part of the id, which had another form.
                        continue
                    # Without the turn's end.
                    if _ANSWER in plain_turn:
                        text = text.removesuffix(plain_turn.rpartition(_ANSWER)[2])
                    found.append(Calls(text, arguments, plain_turn))
                    break
        return found

    def reasoning(self) -> tuple[str, str] | None:
        """The text right before and right after an earlier turn's reasoning; None: nothing is
        kept of it."""
        answer = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
        calling = next(_calling(({KEY: _VALUES[0]},)))
        # Some keep reasoning only on the way to a call's result.
        within_loop = [
            _QUESTION,
            {**calling, "reasoning_content": _THOUGHT},
            {"role": "tool", "content": "result", "tool_call_id": _CALL_IDS[0], "name": NAME},
        ]
        for messages, tools in (([_QUESTION, answer], None), (within_loop, TOOLS)):
            text = self._render(messages, tools)
            if text is not None and _THOUGHT in text:
                before, _, after = text.partition(_THOUGHT)
                return before, after
        return None

    def prompt(self, **variables: Any) -> str | None:
        """The prompt of a question; None: the template refuses it."""
        return self._render([_QUESTION], None, add_generation_prompt=True, **variables)

    def toggle(self) -> str | None:
        """The boolean variable that switches reasoning; None: there is none."""
        for name in TOGGLES:
            if self._template.uses(name):
                on, off = self.prompt(**{name: True}), self.prompt(**{name: False})
                if on is not None and off is not None and on != off:
                    return name
        return None

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str | None:
        try:
            return self._template.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                as_given=True,
                **variables,
            )
        except BadRequestError:
            return None


def markers_around(before: str, after: str) -> tuple[str, str] | None:
    """The markers that end ``before`` and begin ``after``, where both look like markers.

    What stands elsewhere too, as around every message, is none of reasoning's.
    """
    opened, closed = _BEFORE.search(before), _AFTER.match(after)
    if opened is None or closed is None:
        return None
    markers = opened[1], closed[1]
    is_unique = before.count(markers[0]) == 1 and markers[0] not in after
    return markers if is_unique and markers[1] not in before else None


def _common_length(text: str, prompt: str) -> int:
    """The length of a conversation's prompt, after which the model's own text follows."""
    pairs = enumerate(zip(text, prompt, strict=False))
    length = next((at for at, (a, b) in pairs if a != b), min(len(text), len(prompt)))
    # Two markers may begin alike: neither is cut.
    for opened, closed in ("<>", "[]"):
        mark = text.rfind(opened, 0, length)
        if mark >= 0 and closed not in text[mark:length]:
            length = mark
    return length


def last_marker(text: str, *, is_whole: bool = True) -> str:
    """The marker that a text ends with, and the white space behind it; empty: none.

    ``is_whole`` off: it may have been opened and not closed, as ``<function=``.
    """
    found = _BEFORE.search(text)
    if found is None and not is_whole:
        found = _OPEN.search(text)
    return "" if found is None else found[0]


def next_marker(text: str) -> str:
    """The marker that a text begins with, and the white space before it; empty: none."""
    found = _AFTER.match(text)
    return "" if found is None else found[0]


def _calling(arguments: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """An assistant's message that calls; the first form that renders counts."""
    for ids in (_CALL_IDS, tuple(f"functions.{NAME}:{i}" for i in range(2))):
        calls = [
            {"id": ids[i], "type": "function", "function": {"name": NAME, "arguments": dict(one)}}
            for i, one in enumerate(arguments)
        ]
        for content in (None, ""):
            yield {"role": "assistant", "content": content, "tool_calls": calls}
