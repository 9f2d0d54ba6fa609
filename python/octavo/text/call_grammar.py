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


async def answer_constraint(
    core: ChannelFormat,
    use: ToolUse,
    special_tokens: Sequence[tuple[str, int]],
    attempt: Attempt,
    wanted: StructuredOutputsParams | None = None,
) -> StructuredOutputsParams | None:
    """The constraint of an answer to a request that brings tools; None: the request's own.

    ``wanted``: the request's own. Of an answer that may call, one by a schema stands beside the
    calls, and any other binds the whole answer, in which there are no calls then.

    Args and Raises beside it: see ``call_grammar``.
    """
    if core.tool_calls is None or not use.tools or use.mode == "none":
        return None
    answer = None
    if use.mode == "auto" and wanted is not None and (answer := _schema(wanted)) is None:
        return None
    return await call_grammar(core, use, special_tokens, attempt, answer)


def _schema(wanted: StructuredOutputsParams) -> str | None:
    """The JSON schema of a constraint; None: it is one of another kind."""
    if wanted.kind == "json_object":
        return '{"type": "object"}'
    return wanted.text if wanted.kind == "json" else None


async def call_grammar(
    core: ChannelFormat,
    use: ToolUse,
    special_tokens: Sequence[tuple[str, int]],
    attempt: Attempt,
    answer: str | None = None,
) -> StructuredOutputsParams:
    """The constraint of an answer that may, or must, call ``use.tools``.

    One that may, and is any text otherwise, is bound from a call's first marker on: to the names of
    tools, and to the schemas of those that are strict. Calls without markers are known once a
    tool's name is there; where more is asked of them, the answer is bound from its start. A schema
    that no grammar can follow binds the name alone, and is logged.

    Args:
        core: the model's format.
        special_tokens: markers that are one special token each, and their ids.
        attempt: tries a constraint.
        answer: JSON schema of an answer that calls nothing, with ``auto``; None: it is any text.

    Raises:
        InvalidParameterError: no grammar can be made even of the names.
    """

    trigger = None
    if use.mode == "auto" and answer is None and not _is_bound_from_start(core, use):
        texts, at_start = core.triggers([tool.name for tool in use.tools])
        trigger = Trigger(tuple(texts), use.parallel, tuple(at_start))

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


def _is_bound_from_start(core: ChannelFormat, use: ToolUse) -> bool:
    """True if a call that may come has to be right from its first character on."""
    return core.is_bare and (not use.parallel or any(tool.strict for tool in use.tools))


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
