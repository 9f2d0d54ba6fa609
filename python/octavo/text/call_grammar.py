"""call_grammar: the grammar of the calls that a request allows, or insists on."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from octavo._core import ChannelFormat
from octavo.errors import InvalidParameterError
from octavo.structured_outputs import StructuredOutputsParams, Trigger
from octavo.text.tools import Tool, ToolUse

logger = logging.getLogger("octavo.text")

# JSON as json.dumps writes it, which is how models are shown calls, or without spaces, as some are.
# Without room for more white space, small models would fill their answers with it.
_FORM: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Keywords that the grammar cannot follow are left out.
_LENIENT: Final = {**_FORM, "lenient": True, "coerce_one_of": True}
_ANY_OBJECT: Final = json.dumps({"type": "object", "x-guidance": _FORM})

# Raises InvalidParameterError where a grammar cannot be followed.
Attempt = Callable[[StructuredOutputsParams], Awaitable[object]]


def is_bound(core: ChannelFormat, use: ToolUse, may_wake: bool = True) -> bool:
    """True if an answer has to follow a grammar: it must call, may not call twice, a call must fit
    its schema, or is told by a marker, from which on its name can be bound.

    ``may_wake``: see ``call_grammar``.
    """
    if not use.tools or use.mode == "none":
        return False
    if use.mode != "auto" or not use.parallel or any(tool.strict for tool in use.tools):
        return True
    return may_wake and bool(core.triggers)


async def call_grammar(
    core: ChannelFormat,
    use: ToolUse,
    special_tokens: Sequence[tuple[str, int]],
    attempt: Attempt,
    answer: str | None = None,
    may_wake: bool = True,
) -> StructuredOutputsParams:
    """The constraint of an answer that may, or must, call ``use.tools``.

    One that may, and is any text otherwise, is bound from a call's first marker on: to the names of
    tools, and to the schemas of those that are strict. A schema that no grammar can follow binds
    the name alone, and is logged.

    Args:
        core: the model's format.
        special_tokens: markers that are one special token each, and their ids.
        attempt: tries a constraint.
        answer: JSON schema of an answer that calls nothing, with ``auto``; None: it is any text.
        may_wake: a constraint may begin to hold within the answer.

    Raises:
        InvalidParameterError: no grammar can be made even of the names.
    """

    trigger = None
    if use.mode == "auto" and answer is None and may_wake and core.triggers:
        trigger = Trigger(tuple(core.triggers), is_repeated=use.parallel)

    def constraint(tools: Sequence[Tool], schemas: Sequence[str]) -> StructuredOutputsParams:
        text = core.grammar(
            [(tool.name, schema) for tool, schema in zip(tools, schemas, strict=True)],
            at_least_one=use.mode != "auto" or answer is not None,
            at_most_one=use.mode == "named" or not use.parallel,
            calls_only=trigger is not None and trigger.is_repeated,
            strict=[tool.name for tool in tools if tool.strict or use.mode != "auto"],
            special_tokens=special_tokens,
        )
        if answer is not None and use.mode == "auto":
            # The last rule; the grammars of formats have none of this name.
            rules, _, calls = text.rpartition("start: ")
            text = f"{rules}start: ({calls.strip()}) | answer\nanswer: %json {answer}\n"
        return StructuredOutputsParams(grammar=text, param="tools", trigger=trigger)

    tools = list({tool.name: tool for tool in reversed(use.tools)}.values())[::-1]
    schemas = [_guided(tool, _FORM) for tool in tools]
    whole = constraint(tools, schemas)
    try:
        await attempt(whole)
        return whole
    except InvalidParameterError as error:
        failure = error
    for index, tool in enumerate(tools):
        for schema in (schemas[index], _guided(tool, _LENIENT), _ANY_OBJECT):
            schemas[index] = schema
            try:
                await attempt(constraint([tool], [schema]))
                break
            except InvalidParameterError as error:
                logger.warning("tool %s: its schema is not followed: %s", tool.name, error)
    whole = constraint(tools, schemas)
    try:
        await attempt(whole)
    except InvalidParameterError:
        raise failure from None
    return whole


def _guided(tool: Tool, guidance: dict[str, Any]) -> str:
    schema = json.loads(tool.schema)
    with contextlib.suppress(RecursionError):
        schema = _closed(schema)
    return json.dumps({**schema, "x-guidance": guidance}, ensure_ascii=False)


def _closed(schema: Any) -> Any:
    """A schema whose objects hold the properties that it names, and no others where it leaves that
    open: a small model would never stop to make some up."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in ("items", "anyOf", "oneOf", "prefixItems"):
        if key in closed:
            closed[key] = _closed(closed[key])
    for key in ("properties", "$defs", "definitions"):
        if isinstance(closed.get(key), dict):
            closed[key] = {name: _closed(one) for name, one in closed[key].items()}
    # All parts of an allOf describe one object: none of them knows all its properties.
    is_part = any(key in closed for key in ("allOf", "$ref", "patternProperties"))
    if isinstance(closed.get("properties"), dict) and not is_part:
        closed.setdefault("additionalProperties", False)
    return closed
