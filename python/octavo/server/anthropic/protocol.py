"""The bodies of Anthropic's messages: each field checked; those of other names change no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from octavo.errors import InvalidParameterError
from octavo.server.anthropic.conversation import MESSAGES, SYSTEM
from octavo.server.anthropic.tools import TOOL_CHOICE, TOOLS, make_tool_use
from octavo.server.http import fields, limits
from octavo.server.http.body import Body
from octavo.server.work.request import Conversation, GenerationRequest
from octavo.text.tools import ToolUse

# Anthropic's least budget of reasoning.
_LEAST_BUDGET: Final = 1024
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")


@dataclass(slots=True, kw_only=True)
class MessagesRequest(GenerationRequest):
    """A checked /v1/messages request, or one that asks for the number of its tokens.

    Args:
        conversation: before it is made into turns.
        tool_use: the tools it brings, and how they may be used.
        thinks: whether the model is to reason, and the answer to show it.
        thinking_token_budget: after so many tokens the reasoning is ended.
        skipped_tools: types of tools that this server cannot offer.
    """

    takes_any_model: ClassVar[bool] = True

    conversation: Conversation
    tool_use: ToolUse = ToolUse()
    thinks: bool = False
    thinking_token_budget: int | None = None
    skipped_tools: list[str] = field(default_factory=list)


@fields.check(**fields.strings_schema(limits.MAX_STOP_STRINGS, limits.MAX_STOP_STRING_CHARS))
def _stop_sequences(name: str, value: Any) -> tuple[str, ...]:
    stop = fields.strings(name, value, limits.MAX_STOP_STRINGS)
    limits.check_strings(name, stop, limits.MAX_STOP_STRINGS, limits.MAX_STOP_STRING_CHARS)
    return stop


@fields.check(
    type="object",
    properties={
        "type": {"enum": ["enabled", "disabled", "adaptive"]},
        "budget_tokens": {"type": "integer", "minimum": _LEAST_BUDGET},
    },
    required=["type"],
)
def _thinking(name: str, value: Any) -> dict[str, Any]:
    match value:
        case {"type": "disabled" | "adaptive"}:
            return dict(value)
        case {"type": "enabled"}:
            budget = fields.integer(_LEAST_BUDGET)(
                f"{name}.budget_tokens", value.get("budget_tokens")
            )
            return {"type": "enabled", "budget_tokens": budget}
    raise fields.invalid(name, "an object whose type is enabled, disabled or adaptive", value)


_FORMAT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
    "required": ["type", "schema"],
}


@fields.check(**_FORMAT_SCHEMA)
def _format(name: str, value: Any) -> dict[str, Any]:
    match value:
        case {"type": "json_schema", "schema": dict(schema)}:
            return schema
    raise fields.invalid(name, "an object of type json_schema with a schema", value)


@fields.check(
    type="object",
    properties={
        "effort": {"type": ["string", "null"], "enum": [*_EFFORTS, None]},
        "format": {"anyOf": [_FORMAT_SCHEMA, {"type": "null"}]},
    },
)
def _output_config(name: str, value: Any) -> dict[str, Any]:
    config = fields.json_object(name, value)
    clean: dict[str, Any] = {}
    if config.get("effort") is not None:
        clean["effort"] = fields.one_of(*_EFFORTS)(f"{name}.effort", config["effort"])
    if config.get("format") is not None:
        clean["format"] = _format(f"{name}.format", config["format"])
    return clean


_PROMPT_FIELDS: Final[dict[str, fields.Check]] = {
    "model": fields.string(least_chars=1),
    "messages": MESSAGES,
    "system": SYSTEM,
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICE,
    "thinking": _thinking,
    "output_config": _output_config,
    # The same format under its older name.
    "output_format": _format,
}
_SAMPLING_FIELDS: Final[dict[str, fields.Check]] = {
    "max_tokens": fields.integer(1),
    "temperature": fields.number(minimum=0, maximum=1),
    "top_p": fields.number(exclusiveMinimum=0, maximum=1),
    "top_k": fields.integer(-1),
}
# Anthropic's notes to itself, and what only its servers can do.
_IGNORED: Final = frozenset(
    {
        "metadata",
        "service_tier",
        "cache_control",
        "container",
        "context_management",
        "inference_geo",
        "mcp_servers",
        "betas",
        "speed",
    }
)
MESSAGES_BODY: Final = Body(
    {
        **_PROMPT_FIELDS,
        **_SAMPLING_FIELDS,
        "stop_sequences": _stop_sequences,
        "stream": fields.boolean,
    },
    required=("model", "messages", "max_tokens"),
    # Conversations that Anthropic keeps: to answer only the last turn would be another answer.
    refused={"thread": ()},
    ignored=_IGNORED,
    is_open=True,
)
COUNT_TOKENS_BODY: Final = Body(
    _PROMPT_FIELDS, required=("model", "messages"), ignored=_IGNORED, is_open=True
)


def parse_messages(body: Mapping[str, Any]) -> MessagesRequest:
    """Check a /v1/messages body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = MESSAGES_BODY.clean(body)
    sampling = {name: clean.pop(name) for name in _SAMPLING_FIELDS if name in clean}
    if sampling.get("temperature", 0) > 1:
        raise InvalidParameterError("temperature must be between 0 and 1", "temperature")
    if stop := clean.pop("stop_sequences", ()):
        sampling["stop"] = stop
    request = _request(clean, sampling)
    budget = request.thinking_token_budget
    if budget is not None and budget >= sampling["max_tokens"]:
        name = "thinking.budget_tokens"
        raise InvalidParameterError(f"{name} must be less than max_tokens", name)
    return request


def parse_count_tokens(body: Mapping[str, Any]) -> MessagesRequest:
    """Check a /v1/messages/count_tokens body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    return _request(COUNT_TOKENS_BODY.clean(body), {})


def _request(clean: dict[str, Any], sampling: dict[str, Any]) -> MessagesRequest:
    messages = clean.pop("messages")
    if system := clean.pop("system", None):
        messages = [{"role": "system", "content": system}, *messages]
    is_prefilled = _is_prefilled(messages)
    output = clean.pop("output_config", {})
    thinking = clean.pop("thinking", {"type": "disabled"})
    thinks = thinking["type"] != "disabled"
    skipped: list[str] = []
    tool_use = make_tool_use(clean.pop("tools", ()), clean.pop("tool_choice", None), skipped)
    schema = output.get("format", clean.pop("output_format", None))
    if schema is not None:
        sampling["structured_outputs"] = _constraint(schema)
    conversation = Conversation(
        messages=messages,
        add_generation_prompt=not is_prefilled,
        continue_final_message=is_prefilled,
        tools=tool_use.definitions,
        # Anthropic's models reason where they are asked to.
        reasoning_effort=output.get("effort") if thinks else "none",
    )
    return MessagesRequest(
        conversation=conversation,
        tool_use=tool_use,
        thinks=thinks,
        thinking_token_budget=thinking.get("budget_tokens"),
        skipped_tools=skipped,
        sampling=sampling,
        model=clean["model"],
        stream=clean.get("stream", False),
    )


def _constraint(schema: dict[str, Any]) -> Any:
    from octavo.structured_outputs import StructuredOutputsParams

    return StructuredOutputsParams(json=schema, param="output_config.format")


def _is_prefilled(messages: list[dict[str, Any]]) -> bool:
    """True if the answer is to go on with the last message.

    Raises:
        InvalidParameterError: there is nothing to go on with; in Anthropic's words.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    if last.get("tool_calls"):
        ids = ", ".join(call["id"] for call in last["tool_calls"])
        raise InvalidParameterError(
            f"messages: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{ids}",
            "messages",
        )
    content = last["content"]
    if not content:
        raise InvalidParameterError("messages: the final assistant message is empty", "messages")
    if content != content.rstrip():
        raise InvalidParameterError(
            "messages: final assistant content cannot end with trailing whitespace", "messages"
        )
    return True
