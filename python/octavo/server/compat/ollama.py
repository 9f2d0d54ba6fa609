"""Ollama's /api/chat and /api/generate: streams of JSON lines, options in an object of their own.

Fields that tell Ollama how to load a model (``num_ctx``, ``keep_alive``) have no meaning here: it
is loaded. Options that are left out have the model's defaults, not Ollama's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.compat.errors import error_body
from octavo.server.http import fields
from octavo.server.http.body import Body
from octavo.server.openai.messages import MESSAGES_SCHEMA, parse_messages
from octavo.server.openai.protocol import SAMPLING_FIELDS
from octavo.server.work.answer import answer
from octavo.server.work.chat import PLAIN
from octavo.server.work.dialect import Dialect
from octavo.server.work.prompts import encode, encode_chat
from octavo.server.work.request import Conversation, GenerationRequest

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState
    from octavo.server.work.usage import Usage

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
    """Whether an option has an effect at all beside the others."""
    if key in ("repeat_last_n", "penalize_newline"):
        return options.get("repeat_penalty") not in (None, 1)
    if key in ("mirostat_tau", "mirostat_eta"):
        return bool(options.get("mirostat"))
    return True


@fields.check(type=["string", "boolean"])
def _name(name: str, value: Any) -> str:
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


_COMMON: Final[dict[str, fields.Check]] = {
    "model": _name,
    "stream": fields.boolean,
    "options": _options,
    "think": fields.boolean,
}
_REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "format": ("",),
    "logprobs": (False,),
    "images": ([],),
}
_IGNORED: Final = frozenset({"keep_alive"})

CHAT_BODY: Final = Body(
    {**_COMMON, "messages": _messages},
    required=("model", "messages"),
    refused={**_REFUSED, "tools": ([],)},
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
    """A checked request: a conversation, or a text as it stands."""

    conversation: Conversation | None = None
    text: str = ""


def _request(clean: dict[str, Any]) -> dict[str, Any]:
    """What both routes' requests have."""
    # Thinking aloud has a channel of its own, which this dialect lacks.
    if clean.get("think"):
        raise UnsupportedParameterError("think is not supported by this server", "think")
    return {
        "sampling": clean.get("options", {}),
        "model": clean["model"],
        "stream": clean.get("stream", True),
    }


def _conversation(messages: list[dict[str, Any]], clean: Mapping[str, Any]) -> Conversation:
    kwargs = {} if clean.get("think") is None else {"enable_thinking": False}
    is_begun = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    return Conversation(
        messages=messages,
        # Ollama lets the model go on with an assistant's last message.
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        chat_template_kwargs=kwargs,
    )


class OllamaDialect:
    """Base of the two routes' dialects. ``is_chat``: its answers are messages."""

    media_type = "application/x-ndjson"
    error_body = staticmethod(error_body)
    is_chat: bool
    prompt_field: str

    @property
    def ping(self) -> bytes:
        """A line that adds nothing."""
        return _line(done=False, **_content("", self.is_chat))

    early_ping = ping

    async def reply(
        self, request: OllamaRequest, model: ServedModel, request_id: str
    ) -> OllamaReply:
        """The prompt: a rendered conversation, or the text.

        Raises:
            InvalidRequestError: the template refuses it, or it is longer than any that fits.
        """
        if request.conversation is None:
            prompt = await encode(model.engine, request.text, True)
        else:
            prompt = (await encode_chat(model, request.conversation)).token_ids
        return OllamaReply(request, model, [prompt], self)


class ChatDialect(OllamaDialect):
    """Messages in, one message out."""

    is_chat = True
    prompt_field = "messages"

    def parse(self, body: Mapping[str, Any]) -> OllamaRequest:
        """Check a /api/chat body.

        Raises:
            InvalidParameterError, UnsupportedParameterError: naming the field.
        """
        clean = CHAT_BODY.clean(body)
        conversation = _conversation(clean["messages"], clean)
        return OllamaRequest(conversation=conversation, **_request(clean))


class GenerateDialect(OllamaDialect):
    """A prompt in, its answer out; with ``raw`` its continuation."""

    is_chat = False
    prompt_field = "prompt"

    def parse(self, body: Mapping[str, Any]) -> OllamaRequest:
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

    async def reply(
        self, request: OllamaRequest, model: ServedModel, request_id: str
    ) -> OllamaReply:
        """As the base's; a model without a template reads the texts as they are."""
        if request.conversation is not None and not model.has_template:
            parts = [message["content"] for message in request.conversation.messages]
            request.text, request.conversation = "\n\n".join(parts), None
        return await super().reply(request, model, request_id)


class OllamaReply:
    """One sample: a line a piece, and one with the counts at its end."""

    def __init__(
        self,
        request: OllamaRequest,
        model: ServedModel,
        prompts: Sequence[TokenIds],
        dialect: OllamaDialect,
    ) -> None:
        self.prompts = prompts
        self.prompt_field = dialect.prompt_field
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = PLAIN
        self._is_chat = dialect.is_chat
        self._head = {"model": request.model or model.names[0], "created_at": now()}

    def templates(self) -> list[SseTemplate] | None:
        """The frame around a text, for the core."""
        from octavo._core import SseTemplate

        # Not in a model's name: the field is the last but one.
        before, _, after = self._text(_MARK).rpartition(_MARK.encode())
        return [SseTemplate(before, after, b"")]

    def start(self, index: int) -> bytes:
        """Nothing: the first piece opens the stream."""
        return b""

    def text(self, index: int, news: News) -> bytes:
        """A line of text."""
        return self._text(news.text)

    def _text(self, text: str) -> bytes:
        return _line(**self._head, done=False, **_content(text, self._is_chat))

    def end(self, index: int, news: News) -> bytes:
        """The rest of the text, and the counts."""
        rest = self._text(news.text) if news.text else b""
        return rest + _line(**self._head, **_content("", self._is_chat), **_counts(news))

    def close(self, usage: Usage) -> bytes:
        """Nothing: the end has said it all."""
        return b""

    def error(self, error: BaseException) -> bytes:
        """A line with the error."""
        return error_body(error) + b"\n"

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        """The text and the counts."""
        one = news[0]
        return _line(**self._head, **_content(one.text, self._is_chat), **_counts(one))


# A text that JSON leaves as it is.
_MARK: Final = "octavo-text-goes-here-7d02"


def now() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _line(**value: Any) -> bytes:
    return orjson.dumps(value) + b"\n"


def _content(text: str, is_chat: bool) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}


def _counts(news: News) -> dict[str, Any]:
    """Why a sample has ended, its tokens, and nanoseconds."""
    parts = [_nanoseconds(s) for s in (news.queue_s, news.prefill_s, news.decode_s)]
    return {
        "done": True,
        "done_reason": news.finish_reason,
        "total_duration": sum(parts),
        "load_duration": 0,
        "prompt_eval_count": news.num_prompt_tokens,
        "prompt_eval_duration": parts[1],
        "eval_count": news.num_output_tokens,
        "eval_duration": parts[2],
    }


def _nanoseconds(seconds: float | None) -> int:
    return round((seconds or 0.0) * 1e9)


CHAT: Final[Dialect[OllamaRequest]] = ChatDialect()
GENERATE: Final[Dialect[OllamaRequest]] = GenerateDialect()


async def chat(state: ServerState, exchange: Exchange) -> None:
    """Answer a conversation; one without messages asks for the model to be loaded."""
    exchange.allow_any_type()
    if not await _answer_load(state, exchange, "messages"):
        await answer(CHAT, state, exchange)


async def generate(state: ServerState, exchange: Exchange) -> None:
    """Answer a prompt; none at all asks for the model to be loaded."""
    exchange.allow_any_type()
    if not await _answer_load(state, exchange, "prompt"):
        await answer(GENERATE, state, exchange)


async def _answer_load(state: ServerState, exchange: Exchange, field: str) -> bool:
    """Answer a request that only loads a model, or frees its memory. Returns whether it is one."""
    body = await exchange.peek()
    if body.get(field):
        return False
    name = _name("model", body.get("model"))
    state.model_for_work(name)
    await exchange.respond_json(
        {
            "model": name,
            "created_at": now(),
            **_content("", field == "messages"),
            "done": True,
            # It stays loaded: there is no other that needs the memory.
            "done_reason": "unload" if body.get("keep_alive") in (0, "0", "0s") else "load",
        }
    )
    return True
