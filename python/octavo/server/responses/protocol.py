"""The body of a response: each field checked; those of other names change no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from octavo.errors import InvalidParameterError
from octavo.server.http import fields, limits
from octavo.server.http.body import Body
from octavo.server.http.config import EFFORTS
from octavo.server.openai.protocol import COMMON_FIELDS, SAMPLING_FIELDS
from octavo.server.responses.items import INPUT_CHECK, Item
from octavo.server.responses.tools import TOOL_CHOICE, TOOLS, ResponseTools, make_tools
from octavo.server.work.request import GenerationRequest

MAX_ID_CHARS: Final = 256
ENCRYPTED: Final = "reasoning.encrypted_content"
LOGPROBS: Final = "message.output_text.logprobs"
# What an answer may be asked to include. What this server never has is not missed.
_INCLUDE: Final = 64
# OpenAI's.
_METADATA: Final = 16


@dataclass(slots=True, kw_only=True)
class ResponsesRequest(GenerationRequest):
    """A checked /v1/responses request, or one that asks for the number of its tokens.

    Args:
        items: of this request alone.
        instructions: the system's text, of this request alone.
        tools: those that this server can offer.
        effort: of reasoning.
        truncates: whether the oldest items are dropped where there are too many.
        is_stored: whether the response may be asked for again.
        seals_reasoning: whether reasoning is given for clients that keep nothing else of it.
        max_tool_calls: calls beyond so many are ignored.
        shows_tokens: whether the response holds what the model read and wrote, as tokens.
        echo: fields of the body that the response repeats.
    """

    items: list[Item]
    instructions: str | None = None
    tools: ResponseTools = field(default_factory=ResponseTools)
    previous_response_id: str | None = None
    effort: str | None = None
    truncates: bool = False
    is_stored: bool = True
    seals_reasoning: bool = False
    max_tool_calls: int | None = None
    shows_tokens: bool = False
    echo: dict[str, Any] = field(default_factory=dict)


@fields.check(type="object", properties={"effort": {"enum": [*EFFORTS, None]}})
def _reasoning(name: str, value: Any) -> dict[str, Any]:
    given = fields.json_object(name, value)
    reasoning: dict[str, Any] = {"effort": None, "summary": None}
    if (effort := given.get("effort")) is not None:
        reasoning["effort"] = fields.one_of(*EFFORTS)(f"{name}.effort", effort)
    if (summary := given.get("summary")) is not None:
        reasoning["summary"] = fields.string()(f"{name}.summary", summary)
    return reasoning


@fields.check(
    type="object",
    properties={
        "format": {
            "type": ["object", "null"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "name": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["type"],
        },
        "verbosity": {"type": ["string", "null"]},
    },
)
def _text(name: str, value: Any) -> dict[str, Any]:
    text: dict[str, Any] = fields.json_object(name, value)
    match text.get("format"):
        case None | {"type": "text" | "json_object"} | {"type": "json_schema", "schema": dict()}:
            return text
        case {"type": "json_schema"}:
            raise InvalidParameterError(f"{name}.format.schema is missing", f"{name}.format.schema")
    raise fields.invalid(
        f"{name}.format", "an object of type text, json_object or json_schema", text["format"]
    )


@fields.check(type="object", maxProperties=_METADATA, additionalProperties={"type": "string"})
def _metadata(name: str, value: Any) -> dict[str, str]:
    metadata: dict[str, str] = fields.json_object(name, value)
    limits.check_count(name, metadata, _METADATA)
    if not all(isinstance(one, str) for one in metadata.values()):
        raise fields.invalid(name, "an object of strings", value)
    return metadata


@fields.check(type="array", items={"type": "string"}, maxItems=_INCLUDE)
def _include(name: str, value: Any) -> tuple[str, ...]:
    return fields.strings(name, value, _INCLUDE)


_PROMPT_FIELDS: Final[dict[str, fields.Check]] = {
    "model": fields.string(),
    "input": INPUT_CHECK,
    "instructions": fields.string(),
    "previous_response_id": fields.string(MAX_ID_CHARS),
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICE,
    "parallel_tool_calls": fields.boolean,
    "reasoning": _reasoning,
    "text": _text,
    "truncation": fields.one_of("auto", "disabled"),
}
# Those of chat, without what is named otherwise here or makes no sense for one answer.
_SAMPLING: Final = {
    name: check
    for name, check in SAMPLING_FIELDS.items()
    if name not in ("n", "max_tokens", "stream_interval")
}
_FIELDS: Final[dict[str, fields.Check]] = {
    **_PROMPT_FIELDS,
    **_SAMPLING,
    **{name: COMMON_FIELDS[name] for name in ("stream", "priority", "cache_salt", "request_id")},
    "max_output_tokens": fields.integer(1),
    "max_tool_calls": fields.integer(0),
    "store": fields.boolean,
    "include": _include,
    "top_logprobs": fields.integer(0, limits.ALL_LOGPROBS),
    "metadata": _metadata,
    "user": fields.string(),
    "prompt_cache_key": fields.string(),
    "safety_identifier": fields.string(),
    "service_tier": fields.string(),
    # vLLM's.
    "enable_response_messages": fields.boolean,
}
_IGNORED: Final = frozenset(
    {
        "client_metadata",
        "context_management",
        "prompt_cache_options",
        "prompt_cache_retention",
        "stream_options",
    }
)
# A response that goes on without its client, OpenAI's own store of conversations and of prompts.
_REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
}
RESPONSES_BODY: Final = Body(
    _FIELDS, required=("input",), refused=_REFUSED, ignored=_IGNORED, is_open=True
)
INPUT_TOKENS_BODY: Final = Body(
    _PROMPT_FIELDS,
    required=("input",),
    refused={name: _REFUSED[name] for name in ("conversation", "prompt")},
    is_open=True,
)

_ECHOED: Final = ("metadata", "user", "prompt_cache_key", "safety_identifier", "max_tool_calls")


def parse_response(body: Mapping[str, Any]) -> ResponsesRequest:
    """Check a /v1/responses body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    return _request(RESPONSES_BODY.clean(body))


def parse_input_tokens(body: Mapping[str, Any]) -> ResponsesRequest:
    """Check a /v1/responses/input_tokens body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    return _request(INPUT_TOKENS_BODY.clean(body))


def _request(clean: dict[str, Any]) -> ResponsesRequest:
    echo: dict[str, Any] = {name: clean.get(name) for name in _ECHOED}
    echo["metadata"] = echo["metadata"] or {}
    reasoning, text = clean.get("reasoning", {}), clean.get("text", {})
    echo["reasoning"] = reasoning or {"effort": None, "summary": None}
    echo["text"] = {**text, "format": text.get("format") or {"type": "text"}}
    for name, default in (
        ("tools", []),
        ("tool_choice", "auto"),
        ("parallel_tool_calls", True),
        ("max_output_tokens", None),
        ("instructions", None),
        ("previous_response_id", None),
        ("truncation", "disabled"),
        ("top_logprobs", 0),
        ("store", True),
        ("service_tier", "default"),
    ):
        echo[name] = clean.get(name, default)
    tools = make_tools(echo["tools"], clean.get("tool_choice"), echo["parallel_tool_calls"])
    echo["tools"] = [_whole_tool(tool) for tool in echo["tools"]]
    for name, value in echo.items():
        encoded(name, value)
    include = clean.get("include", ())
    sampling = {name: clean[name] for name in _SAMPLING if name in clean}
    if "max_output_tokens" in clean:
        sampling["max_tokens"] = clean["max_output_tokens"]
    num_logprobs: dict[str, int] = {}
    if echo["top_logprobs"] or LOGPROBS in include:
        sampling["logprobs"] = num_logprobs["top_logprobs"] = echo["top_logprobs"]
    if (constraint := _constraint(echo["text"]["format"], tools)) is not None:
        sampling["structured_outputs"] = constraint
    return ResponsesRequest(
        items=clean["input"],
        instructions=clean.get("instructions"),
        tools=tools,
        previous_response_id=clean.get("previous_response_id"),
        effort=reasoning.get("effort"),
        truncates=echo["truncation"] == "auto",
        is_stored=echo["store"],
        seals_reasoning=ENCRYPTED in include,
        max_tool_calls=clean.get("max_tool_calls"),
        shows_tokens=clean.get("enable_response_messages", False),
        echo=echo,
        sampling=sampling,
        num_logprobs=num_logprobs,
        model=clean.get("model"),
        stream=clean.get("stream", False),
        priority=clean.get("priority", 0),
        cache_salt=clean.get("cache_salt"),
        request_id=clean.get("request_id"),
    )


def encoded(name: str, value: Any) -> bytes:
    """A value of the body as JSON.

    Raises:
        InvalidParameterError: it is nested more deeply than it can be written again.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise InvalidParameterError(f"{name} cannot be repeated: {error}", name) from None


def _whole_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as responses repeat it: a function with all of its fields."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


def _constraint(form: Mapping[str, Any], tools: ResponseTools) -> Any:
    """The constraint of the text: a custom tool's grammar, or a format."""
    from octavo.structured_outputs import StructuredOutputsParams

    origin = tools.forced_text
    if origin is not None and origin.grammar is not None:
        syntax, definition = origin.grammar
        if syntax == "lark":
            return StructuredOutputsParams(grammar=definition, param="tools")
        return StructuredOutputsParams(regex=definition, param="tools")
    if form["type"] == "json_object":
        return StructuredOutputsParams(json_object=True, param="text.format")
    if form["type"] == "json_schema":
        return StructuredOutputsParams(json=form["schema"], param="text.format")
    return None
