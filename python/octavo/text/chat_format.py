"""ChatFormat: how a model calls tools and reasons, found from its checkpoint.

In this order, the first that answers: the operator's flag; ``response_template`` of
tokenizer_config.json, in which a checkpoint declares its own form; the form in which the chat
template writes earlier calls, tried on every parser there is (``text/template_probe.py``); words
in the template that only one family uses.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from octavo._core import (
    ChannelFormat,
    ChannelParser,
    Channels,
    Tokenizer,
    reasoning_formats,
    tool_call_formats,
)
from octavo.errors import UnsupportedParameterError
from octavo.structured_outputs import ReasoningTokens
from octavo.text import reasoning_formats as reasoning_names
from octavo.text import tool_formats as tool_names
from octavo.text import tool_prompt
from octavo.text.chat_template import ChatTemplate
from octavo.text.own_markers import own_markers
from octavo.text.template_probe import NAME, SCHEMA, Calls, TemplateProbe, markers_around
from octavo.text.tools import ToolUse

logger = logging.getLogger("octavo.text")

AUTO: Final = "auto"
NONE: Final = "none"
HARMONY: Final = "openai"
# vLLM's names of what the checkpoint declares, which is found without a name.
_DECLARED: Final = ("hf", "response_template")
# vLLM's names of forms that the table has not: what the template shows is found without them.
_UNKNOWN_FORMS: Final = ("beam", "hy_v4", "k2_horizon", "muse", "muse_glimmer", "step5")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A model's format. Immutable; made once per model.

    Args:
        core: what the core needs to know of it; None: there is nothing to parse.
        toggle: the template's boolean variable that switches reasoning; None: it has none.
        summary: one line for the start-up table.
    """

    core: ChannelFormat | None
    toggle: str | None
    summary: str

    @property
    def tool_calls(self) -> str | None:
        """The tool-call format's name."""
        return None if self.core is None else self.core.tool_calls

    @property
    def is_harmony(self) -> bool:
        """True where reasoning and calls are messages of their own, as of gpt-oss."""
        return self.core is not None and self.core.reasoning == HARMONY

    @property
    def reasoning_markers(self) -> tuple[str, str] | None:
        """The markers that open and close the reasoning."""
        return None if self.core is None else self.core.reasoning_markers

    def special_tokens(self, tokenizer: Tokenizer) -> list[tuple[str, int]]:
        """Its markers that are one special token each, and their ids."""
        markers = set() if self.core is None else set(self.core.markers)
        added = tokenizer.added_tokens()
        return [
            (token[0], token_id) for token_id, token in added if token[1] and token[0] in markers
        ]

    def channels(self, prompt: str, use: ToolUse | None, continued: str = "") -> Channels | None:
        """The parsing settings of one request; None: its answer is text and nothing else.

        Args:
            prompt: as rendered; its end tells whether the reasoning is open.
            use: the request's tools.
            continued: the message that the answer goes on with.
        """
        core = self.core
        if core is None:
            return None
        parses_calls = core.tool_calls is not None and use is not None and bool(use.tools)
        parses_calls = parses_calls and use is not None and use.mode != "none"
        if not parses_calls and core.reasoning is None:
            return None
        return Channels(
            core,
            in_reasoning=self.is_reasoning(prompt, continued),
            parse_tool_calls=parses_calls,
            parse_reasoning=core.reasoning is not None,
            tools=use.signatures if parses_calls and use is not None else (),
        )

    def is_reasoning(self, prompt: str, continued: str = "") -> bool:
        """True if an answer to ``prompt`` begins inside the reasoning."""
        markers = self.reasoning_markers
        if markers is None:
            return False
        opened, closed = (marker.strip() for marker in markers)
        if continued:
            return continued.rfind(opened) > continued.rfind(closed)
        return bool(opened) and prompt[-200:].rstrip().endswith(opened)

    def reasoning_tokens(
        self,
        token_to_id: Callable[[str], int | None],
        prompt: str,
        continued: str = "",
        budget: int | None = None,
    ) -> ReasoningTokens | None:
        """The tokens around the reasoning of an answer to ``prompt``; None: it has none.

        ``budget``: the most tokens of it. Harmony's grammars hold the reasoning themselves.

        Raises:
            UnsupportedParameterError: a budget, and no token that ends the reasoning.
        """
        markers = self.reasoning_markers
        if markers is None:
            return None
        opened, closed = (marker.strip() for marker in markers)
        close_id = None if self.is_harmony else token_to_id(closed)
        if close_id is None:
            if budget is not None:
                raise UnsupportedParameterError(
                    "thinking_token_budget is not supported: no token of its own ends this "
                    "model's reasoning",
                    "thinking_token_budget",
                )
            return None
        is_open = self.is_reasoning(prompt, continued)
        # A prompt that has closed it asks for none.
        is_over = not is_open and (continued or prompt).rstrip().endswith(closed)
        open_id = None if is_over else token_to_id(opened)
        if not is_open and open_id is None:
            return None
        return ReasoningTokens(open_id, close_id, is_open, budget)


def check_parser_name(flag: str, value: str | None) -> None:
    """Check the value of ``--tool-call-parser`` or ``--reasoning-parser``.

    Raises:
        ValueError: no such parser; lists those there are.
    """
    _resolve(flag, value)


def _resolve(flag: str, value: str | None) -> str:
    """The canonical name of a parser, AUTO or NONE.

    Raises:
        ValueError: no such parser.
    """
    if value is None or value in (AUTO, NONE, *_DECLARED):
        return NONE if value == NONE else AUTO
    is_tools = flag == "tool_call_parser"
    if value in _UNKNOWN_FORMS:
        option = "--" + flag.replace("_", "-")
        logger.warning(
            "%s %s: octavo has no form of that name; the chat template decides", option, value
        )
        return AUTO
    try:
        core = ChannelFormat(value) if is_tools else ChannelFormat(None, value)
    except ValueError:
        names = ", ".join(tool_call_formats() if is_tools else reasoning_formats())
        option = "--" + flag.replace("_", "-")
        raise ValueError(
            f"{option} must be auto, none, one of {names}, or another name that vLLM has for one "
            f"of them, not {value!r}"
        ) from None
    return (core.tool_calls if is_tools else core.reasoning) or AUTO


def find_chat_format(
    template: ChatTemplate | None,
    *,
    response_template: Any = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> ChatFormat:
    """Find a model's format.

    Args:
        template: the model's; None: it has none, and flags alone decide.
        response_template: of tokenizer_config.json.
        tool_call_parser, reasoning_parser: a name, "auto" (also None) or "none".

    Raises:
        ValueError: a name that is no parser's.
    """
    probe = None if template is None else TemplateProbe(template)
    declared = _declared_words(response_template)
    tools = _find_tools(tool_call_parser, template, probe, declared)
    reasoning = _find_reasoning(reasoning_parser, template, probe, response_template)
    core = None
    overrides = {**tools.overrides, **reasoning.overrides}
    if tools.name is not None or reasoning.name is not None or overrides:
        core = ChannelFormat(
            tools.name, reasoning.name, overrides=json.dumps(overrides) if overrides else None
        )
    toggle = None
    if core is not None and core.reasoning_markers is not None and probe is not None:
        toggle = probe.toggle()
    found = ChatFormat(core, toggle, "")
    return ChatFormat(core, toggle, _summary(found, tools, reasoning, probe))


@dataclass(frozen=True, slots=True)
class _Finding:
    """A format's name, its markers where they are not the table's, and where it was found."""

    name: str | None = None
    where: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)


def _find_tools(
    flag: str | None,
    template: ChatTemplate | None,
    probe: TemplateProbe | None,
    declared: str,
) -> _Finding:
    known = tool_call_formats()
    name = _resolve("tool_call_parser", flag)
    if name == NONE:
        return _Finding()
    if template is not None and not template.knows_tools and not template.knows_calls:
        if name not in (AUTO, tool_prompt.FORMAT):
            logger.warning(
                "the chat template describes no tools; calls are read as %s, not %s",
                tool_prompt.FORMAT,
                name,
            )
        return _Finding(tool_prompt.FORMAT, "described in the system text")
    if name != AUTO:
        family = tool_names.FAMILIES.get(name, ())
        calls = probe.calls() if probe is not None and family else []
        read = (one for one in family if calls and _reads_all(ChannelFormat(one), calls))
        return _Finding(next(read, name), "flag")
    if declared and (name := _sign_of(tool_names.SIGNS, declared, known) or ""):
        return _Finding(name, "response_template")
    if template is None or probe is None:
        return _Finding()
    guess = _sign_of(tool_names.SIGNS, template.source, known)
    calls = probe.calls()
    if calls:
        for name in _by_likelihood(guess, known):
            if _reads_all(ChannelFormat(name), calls):
                return _Finding(_narrower(name, calls), "template")
        for overrides in own_markers(calls):
            if _reads_all(ChannelFormat(overrides=json.dumps(overrides)), calls):
                return _Finding(None, "markers of the template", overrides)
    # Calls that the format cannot read are another's.
    if guess is not None and not calls:
        return _Finding(guess, "words in the template")
    return _Finding()


def _sign_of(
    signs: Sequence[tuple[Sequence[str], str]], text: str, known: Sequence[str]
) -> str | None:
    """The format that a template shows signs of, among ``known``."""
    for words, name in signs:
        if name in known and all(word in text for word in words):
            return name
    return None


def _by_likelihood(guess: str | None, known: Sequence[str]) -> Iterator[str]:
    """The formats to try, the guess first, those that take anything for a call last."""
    if guess is not None:
        yield guess
    yield from (name for name in known if name != guess and name not in tool_names.BARE)
    yield from (name for name in tool_names.BARE if name != guess)


def _narrower(name: str, turns: Sequence[Calls]) -> str:
    """The format that writes calls as the template does, where several read them."""
    own, other = tool_names.NARROWER.get(name, ("", name))
    return name if all(own in calls.text for calls in turns) else other


def _reads_all(core: ChannelFormat, turns: Sequence[Calls]) -> bool:
    """True if the parser of a format gives back the calls that a template has written."""
    return all(_reads(core, calls) for calls in turns)


def _reads(core: ChannelFormat, calls: Calls) -> bool:
    parser = ChannelParser(Channels(core, parse_reasoning=False, tools=[(NAME, SCHEMA)]))
    pieces = [*parser.push(calls.text), *parser.finish()]
    names = [text for kind, _, text in pieces if kind == "name"]
    if names != [NAME] * len(calls.arguments):
        return False
    for index, wanted in enumerate(calls.arguments):
        arguments = "".join(t for kind, at, t in pieces if kind == "arguments" and at == index)
        try:
            if json.loads(arguments) != wanted:
                return False
        except ValueError:
            return False
    # Nothing of a call is left over as text.
    return not any(NAME in text for kind, _, text in pieces if kind == "text")


def _find_reasoning(
    flag: str | None,
    template: ChatTemplate | None,
    probe: TemplateProbe | None,
    response_template: Any,
) -> _Finding:
    known = reasoning_formats()
    name = _resolve("reasoning_parser", flag)
    if name == NONE:
        return _Finding()
    if name != AUTO:
        return _Finding(name, "flag")
    if (markers := _declared_markers(response_template)) is not None:
        return _named_markers(markers, known, "response_template")
    if template is None or probe is None:
        return _Finding()
    around = probe.reasoning()
    if around is not None:
        # Several formats have the markers of this one, and frames around what follows.
        for name in (reasoning_names.THINK, *known):
            markers = ChannelFormat(None, name).reasoning_markers
            if markers is not None and (rest := _after_markers(markers, around)) is not None:
                frames = reasoning_names.FRAMES
                framed = next((frames[one] for one in frames if rest.startswith(one)), name)
                return _Finding(framed if name == reasoning_names.THINK else name, "template")
    sign = _sign_of(reasoning_names.SIGNS, template.source, known)
    if sign is not None:
        return _Finding(sign, "words in the template")
    if around is not None and (markers := markers_around(*around)) is not None:
        return _named_markers(markers, known, "template")
    return _Finding()


def _after_markers(markers: tuple[str, str], around: tuple[str, str]) -> str | None:
    """The text after the reasoning, where that stands between the markers; None: it does not."""
    opened, closed = (marker.strip() for marker in markers)
    before, after = around[0].rstrip(), around[1].lstrip()
    if not opened or not before.endswith(opened) or not after.startswith(closed):
        return None
    return after.removeprefix(closed).lstrip()


def _named_markers(markers: tuple[str, str], known: Sequence[str], where: str) -> _Finding:
    """The format that has these markers, or <think>'s with these in their place."""
    stripped = tuple(marker.strip() for marker in markers)
    for name in known:
        own = ChannelFormat(None, name).reasoning_markers
        if own is not None and tuple(marker.strip() for marker in own) == stripped:
            return _Finding(name, where)
    return _Finding(reasoning_names.THINK, where, {"reasoning": list(stripped)})


# ------------------------------------------------------------------- response_template


def _declared_fields(response_template: Any) -> Mapping[str, Any]:
    if not isinstance(response_template, Mapping):
        return {}
    fields = response_template.get("fields")
    return fields if isinstance(fields, Mapping) else {}


def _declared_words(response_template: Any) -> str:
    """All that the declaration of tool calls says, as a text to look for signs in."""
    calls = _declared_fields(response_template).get("tool_calls")
    if not isinstance(calls, Mapping):
        return ""
    # Patterns are written with backslashes before what is special to them.
    return re.sub(r"\\(\W)", r"\1", " ".join(_strings(calls)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _declared_markers(response_template: Any) -> tuple[str, str] | None:
    """The declared markers of reasoning, where they are literals."""
    fields = _declared_fields(response_template)
    for name in ("thinking", "reasoning_content", "reasoning"):
        field = fields.get(name)
        if isinstance(field, Mapping):
            opened, closed = (_literal(field.get(key)) for key in ("open", "close"))
            if opened is not None and closed is not None:
                return opened, closed
    return None


def _literal(value: Any) -> str | None:
    """A declared literal, of several the first."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None


# ----------------------------------------------------------------------------- summary


def _summary(
    found: ChatFormat, tools: _Finding, reasoning: _Finding, probe: TemplateProbe | None
) -> str:
    calls = "none" if found.tool_calls is None else f"{found.tool_calls} ({tools.where})"
    markers = found.reasoning_markers
    if markers is None:
        return f"tool calls {calls}; reasoning none"
    name = " ".join(markers) if reasoning.overrides else found.core and found.core.reasoning
    text = f"tool calls {calls}; reasoning {name} ({reasoning.where})"
    prompt = None if probe is None else probe.prompt()
    if prompt is not None:
        closed = markers[1].strip()
        tail = prompt[-200:].rstrip()
        if found.is_reasoning(prompt):
            text += ", opened by the prompt"
        elif tail.endswith(closed):
            text += ", closed by the prompt"
        else:
            text += ", up to the model"
    if found.toggle is not None:
        text += f", switched by {found.toggle}"
    return text
