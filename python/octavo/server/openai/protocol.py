"""OpenAI's bodies for generation and tokens: each field checked, none ignored.

A field is in exactly one of a ``Body``'s tables:

- ``fields``: supported;
- ``ignored``: OpenAI's notes to itself, which change no answer;
- ``refused``: known, and refused unless its value asks for nothing;
- none: unknown, refused.

/openapi.json is made of them.

Longer than other files: most of it is the table of fields.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.server.http import fields, limits
from octavo.server.http.body import BOOKKEEPING_FIELDS, Body
from octavo.server.http.config import EFFORTS
from octavo.server.openai import structured
from octavo.server.openai.functions import (
    as_tool_messages,
    function_use,
    has_function_results,
    parse_function_call,
    parse_functions,
)
from octavo.server.openai.messages import MESSAGES_SCHEMA, parse_messages
from octavo.server.work.request import Conversation, GenerationRequest
from octavo.server.work.template_variables import template_variables
from octavo.text.chat_template import MAX_TEMPLATE_CHARS
from octavo.text.tools import (
    MAX_SCHEMA_CHARS,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    NO_TOOLS,
    ToolUse,
    parse_tool_use,
    parse_tools,
)

if TYPE_CHECKING:
    from octavo.server.http.config import ServerConfig


@dataclass(slots=True, kw_only=True)
class OpenAiRequest(GenerationRequest):
    """Fields of both chat and completion requests."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    return_token_ids: bool = False
    # None: the operator's choice.
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    # For the answer; echo with logprobs has the engine compute them too.
    prompt_logprobs: int | None = None

    def configure(self, config: ServerConfig) -> None:
        """See ``GenerationRequest``."""
        if config.enable_force_include_usage:
            self.include_usage = self.continuous_usage_stats = self.stream
        if self.return_tokens_as_token_ids is None:
            self.return_tokens_as_token_ids = config.return_tokens_as_token_ids

    def ask_for_all(self, vocab_size: int) -> None:
        """See ``GenerationRequest``."""
        GenerationRequest.ask_for_all(self, vocab_size)
        if self.prompt_logprobs == limits.ALL_LOGPROBS:
            self.prompt_logprobs = vocab_size


@dataclass(slots=True, kw_only=True)
class ChatRequest(OpenAiRequest):
    """A checked /v1/chat/completions request.

    Args:
        tool_use: the tools it brings, and how they may be used.
        include_reasoning: whether the answer shows the reasoning, if there is any.
        thinking_token_budget: after so many tokens the reasoning is ended.
    """

    conversation: Conversation
    tool_use: ToolUse = NO_TOOLS
    # Whether its call is to be in the older form.
    uses_functions: bool = False
    include_reasoning: bool = True
    thinking_token_budget: int | None = None


@dataclass(slots=True, kw_only=True)
class CompletionRequest(OpenAiRequest):
    """A checked /v1/completions request. ``add_special_tokens`` None: those of the model."""

    default_max_tokens: ClassVar[int | None] = 16

    prompts: list[fields.Prompt]
    echo: bool = False
    add_special_tokens: bool | None = None


@dataclass(slots=True, kw_only=True)
class TokenizeRequest:
    """A checked /tokenize request: a conversation, or else a prompt."""

    model: str | None = None
    prompt: str = ""
    conversation: Conversation | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


@dataclass(slots=True, kw_only=True)
class DetokenizeRequest:
    """A checked /detokenize request."""

    tokens: list[int]
    model: str | None = None


@fields.check(
    anyOf=[
        {"type": "string", "minLength": 1, "maxLength": limits.MAX_STOP_STRING_CHARS},
        fields.strings_schema(limits.MAX_STOP_STRINGS, limits.MAX_STOP_STRING_CHARS),
    ]
)
def _stop(name: str, value: Any) -> tuple[str, ...]:
    stop = fields.string_or_strings(name, value, limits.MAX_STOP_STRINGS)
    limits.check_stop(stop)
    return stop


@fields.check(**fields.strings_schema(limits.MAX_BAD_WORDS, limits.MAX_BAD_WORD_CHARS))
def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    words = fields.strings(name, value, limits.MAX_BAD_WORDS)
    limits.check_bad_words(words)
    return words


@fields.check(
    type="object",
    maxProperties=limits.MAX_LOGIT_BIAS,
    additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
)
def _logit_bias(name: str, value: Any) -> dict[int, float]:
    bias = fields.logit_bias(name, value, limits.MAX_LOGIT_BIAS)
    limits.check_logit_bias(bias)
    return bias


_ALLOWED: Final = fields.token_ids(limits.MAX_ALLOWED_TOKEN_IDS)


@fields.check(**_ALLOWED.schema, minItems=1)
def _allowed_token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids: tuple[int, ...] = _ALLOWED(name, value)
    if not ids:
        raise InvalidParameterError(f"{name} must not be empty", name)
    return ids


_TOKEN_IDS: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 1}


def _prompt_list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": limits.MAX_PROMPTS}


@fields.check(
    anyOf=[
        {"type": "string"},
        _prompt_list({"type": "string"}),
        _TOKEN_IDS,
        _prompt_list(_TOKEN_IDS),
    ]
)
def _prompts(name: str, value: Any) -> list[fields.Prompt]:
    """str, [str], [int] or [[int]] as a list of prompts."""
    return fields.texts_or_ids(name, value, limits.check_prompts)


_TOOL_FIELDS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_FUNCTION_FIELDS: Final = frozenset({"functions", "function_call"})
_TOOL_NAME: Final = {"type": "string", "minLength": 1, "maxLength": MAX_TOOL_NAME_CHARS}
_FUNCTION_NAME: Final = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _TOOL_NAME}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
TOOLS: Final = fields.Check(
    {
        "type": "array",
        "maxItems": MAX_TOOLS,
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {
                        "name": _TOOL_NAME,
                        "description": {"type": ["string", "null"]},
                        "parameters": {
                            "type": ["object", "null"],
                            "description": f"at most {MAX_SCHEMA_CHARS} characters of JSON",
                        },
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["name"],
                },
            },
            "required": ["function"],
        },
    },
    parse_tools,
)


@fields.check(
    anyOf=[
        {"enum": ["none", "auto", "required"]},
        _FUNCTION_NAME,
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {"type": "array", "items": _FUNCTION_NAME, "minItems": 1},
                    },
                    "required": ["tools"],
                },
            },
            "required": ["type", "allowed_tools"],
        },
    ]
)
def _tool_choice(name: str, value: Any) -> Any:
    # Checked together with the tools, which it names.
    if not isinstance(value, str | dict):
        raise fields.invalid(name, "a string or an object", value)
    return value


_boolean = fields.boolean
_NUM_LOGPROBS: Final = fields.integer(-1)


@fields.check(**_NUM_LOGPROBS.schema)
def _logprobs(name: str, value: Any) -> int:
    """A number of alternatives; -1 is all. limits.check_logprobs knows the operator's limit."""
    count: int = _NUM_LOGPROBS(name, value)
    return limits.ALL_LOGPROBS if count == -1 else count


_logprob_token_ids: Final = fields.token_ids(MAX_LOGPROB_TOKEN_IDS)

# Fields that SamplingParams carries under the same name.
SAMPLING_FIELDS: Final[dict[str, fields.Check]] = {
    "n": fields.integer(1, limits.MAX_N),
    "temperature": fields.number(minimum=0, maximum=2),
    "top_p": fields.number(exclusiveMinimum=0, maximum=1),
    "top_k": fields.integer(-1),
    "min_p": fields.number(minimum=0, maximum=1),
    "presence_penalty": fields.number(minimum=-2, maximum=2),
    "frequency_penalty": fields.number(minimum=-2, maximum=2),
    "repetition_penalty": fields.number(exclusiveMinimum=0),
    "seed": fields.integer(-fields.INT64_MAX - 1, fields.INT64_MAX),
    "max_tokens": fields.integer(0),
    "min_tokens": fields.integer(0),
    "stop": _stop,
    "stop_token_ids": fields.token_ids(limits.MAX_STOP_TOKEN_IDS),
    "include_stop_str_in_output": _boolean,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "spaces_between_special_tokens": _boolean,
    "stream_interval": fields.integer(1),
    "logit_bias": _logit_bias,
    "allowed_token_ids": _allowed_token_ids,
    "bad_words": _bad_words,
}

COMMON_FIELDS: Final[dict[str, fields.Check]] = {
    "model": fields.string(),
    "stream": _boolean,
    "stream_options": fields.json_object,
    "priority": fields.PRIORITY,
    "cache_salt": fields.string(limits.MAX_CACHE_SALT_CHARS, least_chars=1),
    "request_id": fields.string(limits.MAX_REQUEST_ID_CHARS, least_chars=1),
    "return_token_ids": _boolean,
    "return_tokens_as_token_ids": _boolean,
    "truncate_prompt_tokens": fields.truncation,
    "truncation_side": fields.one_of("left", "right"),
    "add_special_tokens": _boolean,
    "prompt_logprobs": _logprobs,
}

TEMPLATE_FIELDS: Final[dict[str, fields.Check]] = {
    "messages": fields.Check(MESSAGES_SCHEMA, parse_messages),
    "add_generation_prompt": _boolean,
    "continue_final_message": _boolean,
    "chat_template": fields.string(MAX_TEMPLATE_CHARS, least_chars=1),
    "chat_template_kwargs": template_variables,
    "tools": TOOLS,
}

_CONVERSATION_FIELDS: Final = frozenset(
    {*TEMPLATE_FIELDS, "documents", "reasoning_effort", "add_special_tokens"}
)

CHAT_FIELDS: Final[dict[str, fields.Check]] = {
    **SAMPLING_FIELDS,
    **COMMON_FIELDS,
    **structured.FIELDS,
    **TEMPLATE_FIELDS,
    "max_tokens": fields.integer(1),
    "max_completion_tokens": fields.integer(1),
    "logprobs": _boolean,
    "top_logprobs": _logprobs,
    "documents": fields.json_objects,
    "reasoning_effort": fields.one_of(*EFFORTS),
    "logprob_token_ids": _logprob_token_ids,
    "include_reasoning": _boolean,
    "thinking_token_budget": fields.integer(0),
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _boolean,
    "functions": parse_functions,
    "function_call": parse_function_call,
}

COMPLETION_FIELDS: Final[dict[str, fields.Check]] = {
    **SAMPLING_FIELDS,
    **COMMON_FIELDS,
    **structured.FIELDS,
    "prompt": _prompts,
    "echo": _boolean,
    "logprobs": _logprobs,
    "logprob_token_ids": _logprob_token_ids,
}

TOKENIZE_FIELDS: Final[dict[str, fields.Check]] = {
    **TEMPLATE_FIELDS,
    "model": fields.string(),
    "prompt": fields.string(),
    "add_special_tokens": _boolean,
    "return_token_strs": _boolean,
}

DETOKENIZE_FIELDS: Final[dict[str, fields.Check]] = {
    "model": fields.string(),
    "tokens": fields.token_ids(fields.INT32_MAX),
}

# What both generation routes refuse.
_REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}

CHAT_BODY: Final = Body(
    CHAT_FIELDS,
    required=("messages",),
    refused={
        **_REFUSED,
        "echo": (False,),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        # OpenAI's default, and vLLM's.
        "verbosity": ("medium",),
        "web_search_options": (),
    },
    ignored=BOOKKEEPING_FIELDS,
)
COMPLETION_BODY: Final = Body(
    COMPLETION_FIELDS,
    required=("prompt",),
    refused={**_REFUSED, "suffix": ("",)},
    ignored=BOOKKEEPING_FIELDS,
)
TOKENIZE_BODY: Final = Body(
    TOKENIZE_FIELDS,
    one_of=(("prompt",), ("messages",)),
    ignored=BOOKKEEPING_FIELDS,
)
DETOKENIZE_BODY: Final = Body(DETOKENIZE_FIELDS, required=("tokens",), ignored=BOOKKEEPING_FIELDS)


def _stream_options(clean: dict[str, Any]) -> None:
    options = clean.pop("stream_options", None)
    if options is None:
        return
    if not clean.get("stream"):
        raise InvalidParameterError("stream_options needs stream", "stream_options")
    for key, value in options.items():
        name = f"stream_options.{clip(key)}"
        if key in ("include_usage", "continuous_usage_stats"):
            clean[key] = value is not None and _boolean(name, value)
        elif value not in (None, False):
            # Such as include_obfuscation: padding against observers of encrypted traffic.
            raise UnsupportedParameterError(f"{name} is not supported by this server", name)
    if not clean.get("include_usage"):
        # The usage of every chunk is still usage.
        clean.pop("continuous_usage_stats", None)


def _take(clean: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Move the fields of ``names`` out of ``clean``."""
    return {name: clean.pop(name) for name in [*clean] if name in names}


def _sampling(clean: dict[str, Any]) -> dict[str, Any]:
    """Move the fields of SamplingParams out of ``clean``."""
    sampling = _take(clean, SAMPLING_FIELDS)
    if (constraint := structured.take_constraint(clean)) is not None:
        sampling["structured_outputs"] = constraint
    return sampling


def _num_logprobs(clean: Mapping[str, Any], name: str) -> dict[str, int]:
    """Numbers of alternatives a token, by field: ``name`` and prompt_logprobs."""
    found = {}
    if name in clean:
        found[name] = clean[name]
    if "prompt_logprobs" in clean:
        found["prompt_logprobs"] = clean["prompt_logprobs"]
        if clean.get("stream"):
            raise InvalidParameterError(
                "prompt_logprobs belongs to whole answers, without stream", "prompt_logprobs"
            )
    return found


def _name_tokens(clean: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Move logprob_token_ids, which stand in for the best of each token's log probabilities."""
    token_ids = clean.pop("logprob_token_ids", ())
    if not token_ids:
        return
    if sampling.get("logprobs") is None:
        raise InvalidParameterError("logprob_token_ids needs logprobs", "logprob_token_ids")
    if sampling.get("max_tokens") == 0:
        raise InvalidParameterError(
            "logprob_token_ids are of the answer's tokens, and max_tokens is 0",
            "logprob_token_ids",
        )
    sampling["logprob_token_ids"] = token_ids


def _conversation(clean: dict[str, Any]) -> Conversation:
    """Move the template's fields into a Conversation."""
    own = _take(clean, _CONVERSATION_FIELDS)
    if own.get("continue_final_message"):
        if own.get("add_generation_prompt"):
            raise InvalidParameterError(
                "continue_final_message excludes add_generation_prompt", "continue_final_message"
            )
        own["add_generation_prompt"] = False
    tools = own.pop("tools", ())
    conversation = Conversation(**own)
    if tools:
        _give_tools(conversation, ToolUse(tools))
    return conversation


def _give_tools(conversation: Conversation, use: ToolUse) -> None:
    conversation.tools, conversation.num_tool_chars = use.definitions, use.num_chars


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Check a /v1/chat/completions body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = CHAT_BODY.clean(body)
    _stream_options(clean)
    num_logprobs = _num_logprobs(clean, "top_logprobs")
    wants_logprobs = clean.pop("logprobs", False)
    num_top = clean.pop("top_logprobs", 0)
    if num_top and not wants_logprobs:
        raise InvalidParameterError("top_logprobs needs logprobs: true", "top_logprobs")
    # The newer name wins, as in OpenAI's interface.
    max_tokens = clean.pop("max_completion_tokens", clean.get("max_tokens"))
    if max_tokens is not None:
        clean["max_tokens"] = max_tokens
    tool_use = NO_TOOLS
    uses_functions = not _FUNCTION_FIELDS.isdisjoint(clean)
    if uses_functions:
        if clean.get("tools"):
            raise InvalidParameterError("functions excludes tools, its newer name", "functions")
        clean = {name: value for name, value in clean.items() if name not in _TOOL_FIELDS}
        tool_use = function_use(clean.pop("functions", ()), clean.pop("function_call", None))
    elif not _TOOL_FIELDS.isdisjoint(clean):
        tool_use = parse_tool_use(
            clean.pop("tools", ()),
            clean.pop("tool_choice", None),
            clean.pop("parallel_tool_calls", True),
        )
    if uses_functions or has_function_results(clean["messages"]):
        clean["messages"] = as_tool_messages(clean["messages"])
    conversation = _conversation(clean)
    if tool_use.tools:
        _give_tools(conversation, tool_use)
    sampling = _sampling(clean)
    if wants_logprobs:
        sampling["logprobs"] = num_top
    _name_tokens(clean, sampling)
    sampling["prompt_logprobs"] = clean.get("prompt_logprobs")
    limits.check_samples(1, sampling.get("n", 1))
    return ChatRequest(
        conversation=conversation,
        tool_use=tool_use,
        uses_functions=uses_functions,
        num_logprobs=num_logprobs,
        sampling=sampling,
        **clean,
    )


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Check a /v1/completions body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = COMPLETION_BODY.clean(body)
    _stream_options(clean)
    num_logprobs = _num_logprobs(clean, "logprobs")
    num_top = clean.pop("logprobs", None)
    sampling = _sampling(clean)
    prompts = clean.pop("prompt")
    wanted = [clean.get("prompt_logprobs")]
    if num_top is not None:
        sampling["logprobs"] = num_top
        if clean.get("echo"):
            # The prompt is part of the text whose tokens are reported.
            wanted.append(num_top)
    sampling["prompt_logprobs"] = max((k for k in wanted if k is not None), default=None)
    _name_tokens(clean, sampling)
    if sampling.get("max_tokens") == 0 and not clean.get("echo"):
        raise InvalidParameterError("max_tokens must be at least 1 without echo", "max_tokens")
    limits.check_samples(len(prompts), sampling.get("n", 1))
    return CompletionRequest(prompts=prompts, num_logprobs=num_logprobs, sampling=sampling, **clean)


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """Check a /tokenize body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = TOKENIZE_BODY.clean(body)
    if "messages" in clean:
        clean["conversation"] = _conversation(clean)
    for name in TEMPLATE_FIELDS:
        # There is nothing to render.
        clean.pop(name, None)
    return TokenizeRequest(**clean)


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    """Check a /detokenize body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = DETOKENIZE_BODY.clean(body)
    clean["tokens"] = list(clean["tokens"])
    return DetokenizeRequest(**clean)
