"""ollama_protocol: the bodies of /api/chat and /api/generate, options in an object of their own.

Fields that tell Ollama how to load a model (``num_ctx``, ``keep_alive``) have no meaning here: it
is loaded. Options that are left out have the model's defaults, not Ollama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http import fields
from octavo.server.http.body import Body
from octavo.server.openai.messages import MESSAGES_SCHEMA, parse_messages
from octavo.server.openai.protocol import SAMPLING_FIELDS, TOOLS
from octavo.server.work.request import Conversation, GenerationRequest
from octavo.structured_outputs import StructuredOutputsParams
from octavo.text.tools import NO_TOOLS, ToolUse, parse_tool_use, parse_tools

# Ollama's options -> SamplingParams' fields.
_OPTIONS: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Of loading, of memory, and of threads; num_ctx and num_keep cut what octavo has room for.
_OF_LOADING_TEXT = (
    "num_ctx num_keep num_batch num_gpu main_gpu low_vram numa use_mmap use_mlock num_thread "
    "vocab_only f16_kv logits_all embedding_only"
)
_OF_LOADING: Final = frozenset(_OF_LOADING_TEXT.split())
# Option -> the values that change nothing.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "tfs_z": (1,),
    "typical_p": (1,),
    "repeat_last_n": (-1,),
    "penalize_newline": (True,),
}

_NUM_PREDICT: Final = fields.integer(-2)


@fields.check(type="object")
def _options(name: str, value: Any) -> dict[str, Any]:
    """SamplingParams' fields of an ``options`` object."""
    options: dict[str, Any] = fields.json_object(name, value)
    sampling: dict[str, Any] = {}
    for key, one in options.items():
        place = f"{name}.{clip(key)}"
        if one is None or key in _OF_LOADING:
            continue
        if key == "num_predict":
            # -1 is no limit, -2 what the context holds: the same here.
            count = _NUM_PREDICT(place, one)
            if count == 0:
                raise InvalidParameterError(f"{place} must be -1 or positive", place)
            sampling["max_tokens"] = None if count < 0 else count
        elif (field := _OPTIONS.get(key)) is not None:
            sampling[field] = SAMPLING_FIELDS[field](place, one)
        elif key not in _NEUTRAL:
            raise UnsupportedParameterError(f"Unrecognized request argument: {place}", place)
        elif one not in _NEUTRAL[key] and _matters(key, options):
            raise UnsupportedParameterError(f"{place} is not supported by this server", place)
    return sampling


def _matters(key: str, options: Mapping[str, Any]) -> bool:
    """True if an option has an effect at all beside the others."""
    if key in ("repeat_last_n", "penalize_newline"):
        return options.get("repeat_penalty") not in (None, 1)
    if key in ("mirostat_tau", "mirostat_eta"):
        return bool(options.get("mirostat"))
    return True


@fields.check(type=["string", "boolean"])
def model_name(name: str, value: Any) -> str:
    """A model's name; ``:latest`` is as good as no tag."""
    text: str = fields.string(least_chars=1)(name, value)
    return text


@fields.check(**MESSAGES_SCHEMA)
def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        for index, message in enumerate(value):
            if isinstance(message, dict) and message.get("images"):
                place = f"{name}[{index}].images"
                raise UnsupportedParameterError(f"{place} is not supported by this model", place)
        value = [_renamed(message) for message in value]
    return parse_messages(name, value)


def _renamed(message: Any) -> Any:
    """A message with Ollama's names of fields as OpenAI has them."""
    if not isinstance(message, dict):
        return message
    names = {"tool_name": "name", "thinking": "reasoning"}
    return {names.get(key, key): value for key, value in message.items()}


_EFFORT: Final = fields.one_of("low", "medium", "high")


@fields.check(anyOf=[{"type": "boolean"}, _EFFORT.schema])
def _think(name: str, value: Any) -> bool | str:
    """The effort of reasoning asked for; False for none."""
    think: bool | str = (
        _EFFORT(name, value) if isinstance(value, str) else fields.boolean(name, value)
    )
    return think


@fields.check(anyOf=[{"enum": ["", "json"]}, {"type": "object"}])
def _format(name: str, value: Any) -> StructuredOutputsParams | None:
    """Any JSON object, or a schema of what the answer is to be."""
    if value == "":
        return None
    if value == "json":
        return StructuredOutputsParams(json_object=True, param=name)
    return StructuredOutputsParams(json=fields.json_object(name, value), param=name)


_COMMON: Final[dict[str, fields.Check]] = {
    "model": model_name,
    "stream": fields.boolean,
    "options": _options,
    "think": _think,
    "format": _format,
}
_REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "logprobs": (False,),
    "images": ([],),
}
_IGNORED: Final = frozenset({"keep_alive"})

CHAT_BODY: Final = Body(
    {**_COMMON, "messages": _messages, "tools": fields.Check(TOOLS.schema, parse_tools)},
    required=("model", "messages"),
    refused=_REFUSED,
    ignored=_IGNORED,
)
GENERATE_BODY: Final = Body(
    {
        **_COMMON,
        "prompt": fields.string(),
        "system": fields.string(),
        "raw": fields.boolean,
    },
    required=("model", "prompt"),
    refused={**_REFUSED, "suffix": ("",), "template": ("",), "context": ([],)},
    ignored=_IGNORED,
)


@dataclass(slots=True, kw_only=True)
class OllamaRequest(GenerationRequest):
    """A checked request: a conversation, or a text as it stands.

    Args:
        tool_use: the tools that the model may call.
        think: whether it reasons, or how much; None: as its template has it.
    """

    conversation: Conversation | None = None
    text: str = ""
    tool_use: ToolUse = NO_TOOLS
    think: bool | str | None = None


def _request(clean: dict[str, Any]) -> dict[str, Any]:
    """The fields of both routes' requests."""
    sampling = clean.get("options", {})
    if (constraint := clean.get("format")) is not None:
        sampling["structured_outputs"] = constraint
    return {
        "sampling": sampling,
        "model": clean["model"],
        "stream": clean.get("stream", True),
        "think": clean.get("think"),
    }


def _conversation(messages: list[dict[str, Any]], clean: Mapping[str, Any]) -> Conversation:
    think = clean.get("think")
    is_begun = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    return Conversation(
        messages=messages,
        # Ollama lets the model go on with an assistant's last message.
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        reasoning_effort="none" if think is False else think if isinstance(think, str) else None,
    )


def parse_chat(body: Mapping[str, Any]) -> OllamaRequest:
    """Check a /api/chat body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = CHAT_BODY.clean(body)
    conversation = _conversation(clean["messages"], clean)
    use = parse_tool_use(clean.get("tools", ()))
    conversation.tools, conversation.num_tool_chars = use.definitions, use.num_chars
    return OllamaRequest(conversation=conversation, tool_use=use, **_request(clean))


def parse_generate(body: Mapping[str, Any]) -> OllamaRequest:
    """Check a /api/generate body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = GENERATE_BODY.clean(body)
    if clean.get("raw"):
        if clean.get("system"):
            raise InvalidParameterError("system has no place with raw", "system")
        return OllamaRequest(text=clean["prompt"], **_request(clean))
    messages = [{"role": "user", "content": clean["prompt"]}]
    if clean.get("system"):
        messages.insert(0, {"role": "system", "content": clean["system"]})
    return OllamaRequest(conversation=_conversation(messages, clean), **_request(clean))
