"""OpenAI's dialect: server-sent events of JSON chunks, as chat and completions share them."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from octavo import __version__
from octavo.server.openai.errors import error_body, error_object
from octavo.server.work.chat import PLAIN, ChatPlan
from octavo.server.work.usage import Usage, slowest_timings, timings_object, usage_object

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.openai.protocol import OpenAiRequest
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel

FINGERPRINT: Final = f"octavo-{__version__}"

DONE: Final = b"data: [DONE]\n\n"

# Placeholder of the text that the core puts in. Random: a model's name or a request's id may hold
# any text, but not this one.
_TEXT: Final = secrets.token_hex(16)


def sse_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class OpenAiDialect:
    """Base of the generation routes' dialects."""

    media_type = "text/event-stream; charset=utf-8"
    # A comment, which is no event.
    ping = early_ping = b": ping\n\n"
    error_body = staticmethod(error_body)


class OpenAiReply(ABC):
    """Base of the generation routes' replies.

    ``id`` and ``created`` are the same in every chunk.
    """

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]
    id_prefix: ClassVar[str]
    prompt_field: ClassVar[str]

    def __init__(
        self,
        request: OpenAiRequest,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[TokenIds],
        plan: ChatPlan = PLAIN,
    ) -> None:
        self.request = request
        self.prompts = prompts
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = plan
        self._texts = model.token_texts
        self._request_id = request_id
        self._chunk: dict[str, Any] = {
            "id": f"{self.id_prefix}-{request.request_id or request_id}",
            "object": self.chunk_object_name,
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "system_fingerprint": FINGERPRINT,
        }

    # ------------------------------------------------------------- where the routes differ

    @abstractmethod
    def start(self, index: int) -> bytes:
        """The event that opens a sample's stream; empty: it opens with its text."""

    @abstractmethod
    def text_choice(
        self, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        """The choice of a chunk that carries text."""

    @abstractmethod
    def decorate(self, choice: dict[str, Any], index: int, news: News) -> None:
        """Add to a choice what a plain stream does not carry: logprobs, token ids."""

    @abstractmethod
    def whole_choice(self, index: int, news: News) -> dict[str, Any]:
        """The choice of a whole answer. ``news`` holds all of the sample's output."""

    # ------------------------------------------------------------------------ the stream

    def templates(self) -> list[SseTemplate] | None:
        """One per sample, unless chunks carry more than text."""
        request = self.request
        if (
            request.sampling.get("logprobs") is not None
            or request.return_token_ids
            or request.continuous_usage_stats
        ):
            return None
        return [self._template(index) for index in range(len(self.prompts) * request.n)]

    def _template(self, index: int) -> SseTemplate:
        from octavo._core import SseTemplate

        event = self.chunk_event([self.text_choice(index, _TEXT, None, None)])
        before, _, after = event.partition(_TEXT.encode())
        choice = self.reasoning_choice(index, _TEXT)
        parts = None
        if choice is not None:
            parts = self.chunk_event([choice]).split(_TEXT.encode())
        return SseTemplate(before, after, self.start(index), parts)

    def reasoning_choice(self, index: int, text: str) -> dict[str, Any] | None:
        """The choice of a chunk that carries reasoning; None: none is shown."""
        return None

    def chunk_event(self, choices: list[dict[str, Any]], **fields: Any) -> bytes:
        """One chunk of a stream."""
        chunk = {**self._chunk, "choices": choices, **fields}
        if self.request.include_usage:
            # Null until the last chunk, as OpenAI has it.
            chunk.setdefault("usage", None)
        return sse_event(chunk)

    def first_usage(self, index: int) -> dict[str, Any]:
        """``usage`` of a chunk before the first token, where every chunk has one."""
        if not self.request.continuous_usage_stats:
            return {}
        num_prompt_tokens = len(self.prompts[index // self.request.n])
        num_reasoning_tokens = None if self.plan.channels is None else 0
        return {"usage": usage_object(num_prompt_tokens, 0, 0, num_reasoning_tokens)}

    def text(self, index: int, news: News) -> bytes:
        """A chunk with all its decorations."""
        return self._text_event(index, news)

    def end(self, index: int, news: News) -> bytes:
        """The chunk with the finish reason, and the sample's timings."""
        return self._text_event(index, news, timings=timings_object(news))

    def _text_event(self, index: int, news: News, **fields: Any) -> bytes:
        choice = self.text_choice(index, news.text, news.finish_reason, news.stop_reason)
        self.decorate(choice, index, news)
        return self._news_event([choice], news, **fields)

    def _news_event(self, choices: list[dict[str, Any]], news: News, **fields: Any) -> bytes:
        """A chunk, with the usage so far where every chunk has one."""
        if self.request.continuous_usage_stats:
            fields["usage"] = usage_object(
                news.num_prompt_tokens,
                news.num_cached_tokens,
                news.num_output_tokens,
                self._num_reasoning_tokens(news),
            )
        return self.chunk_event(choices, **fields)

    def _num_reasoning_tokens(self, news: News) -> int | None:
        return None if self.plan.channels is None else news.num_reasoning_tokens

    def close(self, usage: Usage) -> bytes:
        """The extra chunk of ``include_usage``, and the end mark."""
        if self.request.include_usage:
            return self.chunk_event([], usage=usage.to_object()) + DONE
        return DONE

    def error(self, error: BaseException) -> bytes:
        """The error's object as an event, and the end mark."""
        return sse_event(error_object(error, self._request_id)) + DONE

    # ------------------------------------------------------------------ the whole answer

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        """All choices, usage, and the timings of the slowest sample."""
        return orjson.dumps(self.whole_object(news, usage))

    def whole_object(self, news: Sequence[News], usage: Usage) -> dict[str, Any]:
        """The whole answer before it is written down."""
        return {
            **self._chunk,
            "object": self.object_name,
            "choices": [self.whole_choice(index, one) for index, one in enumerate(news)],
            "usage": usage.to_object(),
            "timings": slowest_timings(news),
        }
