"""StructuredOutputsParams: a constraint on a request's text, and the reasoning before it."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from octavo.errors import InvalidParameterError

GrammarKind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]

KINDS: Final[tuple[GrammarKind, ...]] = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "structural_tag",
)


class Trigger(NamedTuple):
    """The texts from which on a constraint holds.

    ``is_repeated``: to where it may end, and again from the next one; else from the first one to
    the text's end. ``at_start``: texts that count where an answer begins, and not within it.
    """

    texts: tuple[str, ...]
    is_repeated: bool
    at_start: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """A constraint on a request's text, with vLLM's names and meanings: exactly one kind of it.

    Args:
        json: a JSON schema, as text or as an object.
        regex: the whole text matches it.
        choice: texts, one of which it is.
        grammar: Lark or GBNF.
        json_object: any JSON object.
        structural_tag: texts between tags that follow schemas, as text or as an object.
        disable_any_whitespace: no whitespace between the parts of JSON.
        disable_additional_properties: objects have only the properties that the schema names.
        whitespace_pattern: a regular expression of the whitespace between the parts of JSON.
        param: the request's field that errors name, where it is not this one.
        trigger: where it begins to hold, any text before it being part of the constraint; None:
            from the start.

    Raises:
        InvalidParameterError: from construction: none or several kinds, or a value of another type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    param: str | None = field(default=None, compare=False, repr=False)
    trigger: Trigger | None = field(default=None, compare=False, repr=False)
    kind: GrammarKind = field(init=False, compare=False, repr=False)
    # The constraint in its kind's language.
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if self.json is False:
            given.insert(0, "json")
        if len(given) != 1:
            found = "none of them is there" if not given else f"not {' and '.join(given)}"
            raise self._refusal(f"must hold exactly one of {', '.join(KINDS)}: {found}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise self._refusal(f"{name} must be true or false")
        pattern: object = self.whitespace_pattern
        if pattern is not None and not (isinstance(pattern, str) and pattern):
            raise self._refusal("whitespace_pattern must be a string that is not empty")
        [kind] = given
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "text", self._text(kind, getattr(self, kind)))

    def _text(self, kind: GrammarKind, value: Any) -> str:
        if kind == "json_object":
            if value is not True:
                raise self._refusal("json_object must be true or false")
            return ""
        if kind == "choice":
            is_list = isinstance(value, list | tuple) and value
            if not is_list or not all(isinstance(text, str) and text for text in value):
                raise self._refusal("choice must be a list of strings, none of them empty")
            object.__setattr__(self, "choice", tuple(value))
            return self._dumps(kind, list(value))
        if kind in ("json", "structural_tag") and not isinstance(value, str):
            is_schema = isinstance(value, Mapping) or (kind == "json" and isinstance(value, bool))
            if not is_schema:
                raise self._refusal(f"{kind} must be an object, or JSON text of one")
            return self._dumps(kind, value)
        if not isinstance(value, str) or not value.strip():
            raise self._refusal(f"{kind} must be a string that is not empty")
        return value

    def _dumps(self, kind: GrammarKind, value: Any) -> str:
        try:
            text = json_module.dumps(
                dict(value) if isinstance(value, Mapping) else value,
                ensure_ascii=False,
                separators=(",", ":"),
                allow_nan=False,
            )
            text.encode()
        except (TypeError, ValueError, RecursionError):
            raise self._refusal(f"{kind} cannot be written as JSON") from None
        return text

    def _refusal(self, must: str) -> InvalidParameterError:
        name = self.param or "structured_outputs"
        between = " " if must.startswith("must") else "."
        return InvalidParameterError(f"{name}{between}{must}", name)


class ReasoningTokens(NamedTuple):
    """The tokens around a request's reasoning, during which no constraint holds.

    ``open_id`` opens it as the first token, None where only the prompt does; ``close_id`` closes
    it; ``is_open``: the prompt has opened it. After ``budget`` tokens of it ``close_id`` is forced.
    """

    open_id: int | None
    close_id: int
    is_open: bool
    budget: int | None = None
