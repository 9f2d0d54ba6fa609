"""The shapes of requests: every field of every generation route, checked, none ignored.

A field is in exactly one of these tables:

- ``SAMPLING_FIELDS`` and the routes' own tables: supported;
- ``BOOKKEEPING_FIELDS``: OpenAI's notes to itself, which change no answer;
- ``UNSUPPORTED_FIELDS``: known, and refused unless its value asks for nothing;
- none: unknown, refused.

/openapi.json is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from octavo._core import TokenIds
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.sampling_params import SamplingParams
from octavo.server.http import fields, limits
from octavo.server.openai.messages import MESSAGES_SCHEMA, parse_messages
from octavo.text.chat_template import MAX_TEMPLATE_CHARS, RESERVED_VARIABLES

Prompt = str | TokenIds

# Names that render() itself takes beside the template's variables.
_RESERVED_KWARGS: Final = RESERVED_VARIABLES | {"continue_final_message", "self"}


@dataclass(slots=True, kw_only=True)
class GenerationRequest:
    """What chat and completion requests share. ``sampling`` holds SamplingParams' fields."""

    # None: what fits into the context.
    default_max_tokens: ClassVar[int | None] = None

    sampling: dict[str, Any]
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    # What the answer reports; echo with logprobs asks the engine for them too.
    prompt_logprobs: int | None = None

    @property
    def n(self) -> int:
        """Samples per prompt."""
        return int(self.sampling.get("n", 1))

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The request's own values over the model's defaults over OpenAI's.

        Raises:
            InvalidParameterError: a value is out of range.
        """
        own = {"max_tokens": self.default_max_tokens, **defaults, **self.sampling}
        return SamplingParams(**own)


@dataclass(slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A checked /v1/chat/completions request."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any]
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


@dataclass(slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """A checked /v1/completions request."""

    default_max_tokens: ClassVar[int | None] = 16

    prompts: list[Prompt]
    echo: bool = False


@dataclass(slots=True, kw_only=True)
class TokenizeRequest:
    """A checked /tokenize request: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any]
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
    stop = fields.string_or_strings(name, value)
    limits.check_stop(stop)
    return stop


@fields.check(**fields.strings_schema(limits.MAX_BAD_WORDS, limits.MAX_BAD_WORD_CHARS))
def _bad_words(name: str, value: Any) -> tuple[str, ...]:
    words = fields.strings(name, value)
    limits.check_bad_words(words)
    return words


@fields.check(
    type="object",
    maxProperties=limits.MAX_LOGIT_BIAS,
    additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
)
def _logit_bias(name: str, value: Any) -> dict[int, float]:
    bias = fields.logit_bias(name, value)
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
def prompts(name: str, value: Any) -> list[Prompt]:
    """str, [str], [int] or [[int]] as a list of prompts."""
    return fields.texts_or_ids(name, value, limits.check_prompts)


@fields.check(type="integer", minimum=-1, maximum=fields.INT32_MAX, **{"not": {"const": 0}})
def truncation(name: str, value: Any) -> int:
    most: int = fields.integer(-1)(name, value)
    if most == 0:
        raise InvalidParameterError(f"{name} must be -1 or positive", name)
    return most


@fields.check(type="object")
def _template_kwargs(name: str, value: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = fields.json_object(name, value)
    for key in kwargs:
        if key in _RESERVED_KWARGS:
            field = f"{name}.{key}"
            raise InvalidParameterError(f"{field} is not a template's own variable", field)
    return kwargs


_boolean = fields.boolean
# The operator may allow fewer: limits.check_logprobs has the last word.
_LOGPROBS: Final = fields.integer(0, limits.MAX_LOGPROBS)

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
    "priority": fields.integer(),
    "cache_salt": fields.string(limits.MAX_CACHE_SALT_CHARS, least_chars=1),
    "request_id": fields.string(limits.MAX_REQUEST_ID_CHARS, least_chars=1),
    "return_token_ids": _boolean,
    "return_tokens_as_token_ids": _boolean,
    "truncate_prompt_tokens": truncation,
    "add_special_tokens": _boolean,
    "prompt_logprobs": _LOGPROBS,
}

TEMPLATE_FIELDS: Final[dict[str, fields.Check]] = {
    "messages": fields.Check(MESSAGES_SCHEMA, parse_messages),
    "add_generation_prompt": _boolean,
    "continue_final_message": _boolean,
    "chat_template": fields.string(MAX_TEMPLATE_CHARS, least_chars=1),
    "chat_template_kwargs": _template_kwargs,
}

CHAT_FIELDS: Final[dict[str, fields.Check]] = {
    **SAMPLING_FIELDS,
    **COMMON_FIELDS,
    **TEMPLATE_FIELDS,
    "max_tokens": fields.integer(1),
    "max_completion_tokens": fields.integer(1),
    "logprobs": _boolean,
    "top_logprobs": _LOGPROBS,
    "documents": fields.json_objects,
    "reasoning_effort": fields.one_of("none", "minimal", "low", "medium", "high", "xhigh"),
}

COMPLETION_FIELDS: Final[dict[str, fields.Check]] = {
    **SAMPLING_FIELDS,
    **COMMON_FIELDS,
    "prompt": prompts,
    "echo": _boolean,
    "logprobs": _LOGPROBS,
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

BOOKKEEPING_FIELDS: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)


# name -> the values that ask for nothing that we would have to do; null does so everywhere.
UNSUPPORTED_FIELDS: Final[dict[str, tuple[Any, ...]]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "suffix": (),
    "echo": (False,),
    "documents": (),
    "reasoning_effort": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}


class Body(NamedTuple):
    """What a route's body may hold. ``fields``: those it supports."""

    fields: Mapping[str, fields.Check]
    required: tuple[str, ...]
    one_of: tuple[str, ...] = ()


CHAT_BODY: Final = Body(CHAT_FIELDS, ("messages",))
COMPLETION_BODY: Final = Body(COMPLETION_FIELDS, ("prompt",))
TOKENIZE_BODY: Final = Body(TOKENIZE_FIELDS, (), one_of=("prompt", "messages"))
DETOKENIZE_BODY: Final = Body(DETOKENIZE_FIELDS, ("tokens",))


def checked(body: dict[str, Any], table: Mapping[str, fields.Check]) -> dict[str, Any]:
    """The body's fields, clean; null is absence.

    Raises:
        UnsupportedParameterError, InvalidParameterError: naming the field.
    """
    clean: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in BOOKKEEPING_FIELDS:
            continue
        check = table.get(name)
        if check is not None:
            clean[name] = check(name, value)
            continue
        neutral = UNSUPPORTED_FIELDS.get(name)
        if neutral is None:
            name = name[:100]
            raise UnsupportedParameterError(f"Unrecognized request argument: {name}", name)
        # 1 equals true in Python, not in JSON.
        if not any(type(value) is type(one) and value == one for one in neutral):
            raise UnsupportedParameterError(f"{name} is not supported by this server", name)
    return clean


def require(clean: Mapping[str, Any], name: str) -> None:
    if name not in clean:
        raise InvalidParameterError(f"{name} is missing", name)


def _stream_options(clean: dict[str, Any]) -> None:
    options = clean.pop("stream_options", None)
    if options is None:
        return
    if not clean.get("stream"):
        raise InvalidParameterError("stream_options needs stream", "stream_options")
    for key, value in options.items():
        name = f"stream_options.{key}"
        if key in ("include_usage", "continuous_usage_stats"):
            clean[key] = value is not None and _boolean(name, value)
        elif value not in (None, False):
            # Such as include_obfuscation: padding against observers of encrypted traffic.
            raise UnsupportedParameterError(f"{name} is not supported by this server", name)


def _prompt_logprobs(clean: dict[str, Any], max_logprobs: int) -> None:
    num_logprobs = clean.get("prompt_logprobs")
    if num_logprobs is None:
        return
    limits.check_logprobs("prompt_logprobs", num_logprobs, max_logprobs)
    if clean.get("stream"):
        raise InvalidParameterError(
            "prompt_logprobs belongs to whole answers, without stream", "prompt_logprobs"
        )


def _split(clean: dict[str, Any]) -> dict[str, Any]:
    """Move SamplingParams' fields into ``sampling``."""
    sampling = {name: clean.pop(name) for name in SAMPLING_FIELDS.keys() & clean.keys()}
    return {**clean, "sampling": sampling}


def _continuation(clean: dict[str, Any]) -> None:
    if not clean.get("continue_final_message"):
        return
    if clean.get("add_generation_prompt"):
        raise InvalidParameterError(
            "continue_final_message excludes add_generation_prompt", "continue_final_message"
        )
    clean["add_generation_prompt"] = False


def parse_chat(body: dict[str, Any], max_logprobs: int = limits.MAX_LOGPROBS) -> ChatRequest:
    """Check a /v1/chat/completions body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = checked(body, CHAT_FIELDS)
    require(clean, "messages")
    _stream_options(clean)
    _continuation(clean)
    _prompt_logprobs(clean, max_logprobs)
    clean.setdefault("chat_template_kwargs", {})
    wants_logprobs = clean.pop("logprobs", False)
    num_logprobs = clean.pop("top_logprobs", None)
    if num_logprobs is not None:
        limits.check_logprobs("top_logprobs", num_logprobs, max_logprobs)
        if num_logprobs and not wants_logprobs:
            raise InvalidParameterError("top_logprobs needs logprobs: true", "top_logprobs")
    # The newer name wins, as in OpenAI's interface.
    max_tokens = clean.pop("max_completion_tokens", clean.get("max_tokens"))
    if max_tokens is not None:
        clean["max_tokens"] = max_tokens
    split = _split(clean)
    if wants_logprobs:
        split["sampling"]["logprobs"] = num_logprobs or 0
    split["sampling"]["prompt_logprobs"] = split.get("prompt_logprobs")
    limits.check_samples(1, split["sampling"].get("n", 1))
    return ChatRequest(**split)


def parse_completion(
    body: dict[str, Any], max_logprobs: int = limits.MAX_LOGPROBS
) -> CompletionRequest:
    """Check a /v1/completions body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = checked(body, COMPLETION_FIELDS)
    require(clean, "prompt")
    _stream_options(clean)
    _prompt_logprobs(clean, max_logprobs)
    num_logprobs = clean.pop("logprobs", None)
    split = _split(clean)
    sampling = split["sampling"]
    split["prompts"] = split.pop("prompt")
    wanted = [split.get("prompt_logprobs")]
    if num_logprobs is not None:
        limits.check_logprobs("logprobs", num_logprobs, max_logprobs)
        sampling["logprobs"] = num_logprobs
        if split.get("echo"):
            # The prompt is part of the text whose tokens are reported.
            wanted.append(num_logprobs)
    sampling["prompt_logprobs"] = max((k for k in wanted if k is not None), default=None)
    if sampling.get("max_tokens") == 0 and not split.get("echo"):
        raise InvalidParameterError("max_tokens must be at least 1 without echo", "max_tokens")
    limits.check_samples(len(split["prompts"]), sampling.get("n", 1))
    return CompletionRequest(**split)


def parse_tokenize(body: dict[str, Any]) -> TokenizeRequest:
    """Check a /tokenize body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = checked(body, TOKENIZE_FIELDS)
    if ("prompt" in clean) == ("messages" in clean):
        raise InvalidParameterError("give either prompt or messages", "prompt")
    _continuation(clean)
    clean.setdefault("chat_template_kwargs", {})
    return TokenizeRequest(**clean)


def parse_detokenize(body: dict[str, Any]) -> DetokenizeRequest:
    """Check a /detokenize body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = checked(body, DETOKENIZE_FIELDS)
    require(clean, "tokens")
    clean["tokens"] = list(clean["tokens"])
    return DetokenizeRequest(**clean)
