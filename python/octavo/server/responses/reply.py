"""ResponsesReply: an answer as OpenAI's response, whole or as its events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from octavo.errors import error_kind, error_message
from octavo.server.openai.logprobs import chat_logprobs
from octavo.server.responses.output import Output
from octavo.server.work.blocks import Blocks
from octavo.server.work.news import pieces_of
from octavo.server.work.usage import num_written
from octavo.text.tools import call_id, num_tool_calls

if TYPE_CHECKING:
    from octavo._core import Piece, SseTemplate, TokenIds
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.server.responses.output import Event
    from octavo.server.responses.protocol import ResponsesRequest
    from octavo.server.work.chat import ChatPlan
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.usage import Usage

# Takes a response that is over.
Keep = Callable[[dict[str, Any]], None]


class ResponsesReply:
    """The answer to one request.

    Every event has a number, so that none can be made before the one before it: the core writes
    none of them.

    ``keep``, where it is set, takes the response once it is over.

    Args:
        conversation: the messages of the prompt.
    """

    prompt_field = "input"

    def __init__(
        self,
        request: ResponsesRequest,
        model: ServedModel,
        request_id: str,
        prompt: TokenIds,
        plan: ChatPlan,
        conversation: Sequence[Mapping[str, Any]],
    ) -> None:
        self.request = request
        self.prompts: Sequence[TokenIds] = [prompt]
        self.scores: dict[int, PromptLogprobs] = {}
        self.plan = plan
        self._model = model
        self._request_id = request_id
        self.keep: Keep | None = None
        num_earlier = num_tool_calls(conversation)
        form = model.chat_format.tool_calls
        most = request.max_tool_calls
        if not request.tools.use.parallel:
            most = 1 if most is None else min(most, 1)
        self._blocks = Blocks(
            lambda name, number, given: call_id(form, name, num_earlier + number, given),
            max_calls=most,
        )
        self._output = Output(
            request.tools,
            is_sealed=request.seals_reasoning,
            is_raw=request.tools.forced_text is not None,
        )
        # The call that a forced text becomes, until it has begun.
        self._forced: str | None = None
        self._is_forced = request.tools.forced_text is not None
        if self._is_forced:
            self._forced = request.tools.use.tools[0].name
        self._number = 0
        # What the model has written, where it is asked for.
        self._token_ids: list[int] = []
        self._response = self._new_response()

    def _new_response(self) -> dict[str, Any]:
        request, defaults = self.request, self._model.engine.generation_defaults
        temperature = request.sampling.get("temperature", defaults.get("temperature", 1.0))
        return {
            "id": f"resp_{request.request_id or secrets.token_hex(20)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": request.model or self._model.names[0],
            "output": [],
            "temperature": temperature,
            "top_p": request.sampling.get("top_p", defaults.get("top_p", 1.0)),
            "presence_penalty": request.sampling.get("presence_penalty", 0.0),
            "frequency_penalty": request.sampling.get("frequency_penalty", 0.0),
            "usage": None,
            "completed_at": None,
            **request.echo,
        }

    # ------------------------------------------------------------------------ the stream

    def templates(self) -> list[SseTemplate] | None:
        """None: see the class."""
        return None

    def start(self, index: int) -> bytes:
        response = {"response": self._response}
        return self._frames([("created", response), ("in_progress", response)])

    def text(self, index: int, news: News) -> bytes:
        return self._frames(self._events(news))

    def end(self, index: int, news: News) -> bytes:
        """The rest of the items, and the response with all of them."""
        frames = self._frames(self._events(news)) + self._frames(self._last_events(news))
        response = self._finish(news)
        return frames + self._frames([(response["status"], {"response": response})])

    def close(self, usage: Usage) -> bytes:
        """Nothing: the last event has said it all."""
        return b""

    def error(self, error: BaseException) -> bytes:
        """The response as one that has failed; before its first event the error alone."""
        message = error_message(error, self._request_id)
        code = "server_error" if error_kind(error).status >= 500 else "invalid_prompt"
        if not self._number:
            fields = {"type": "error", "code": code, "message": message, "param": None}
            return b"event: error\ndata: %b\n\n" % orjson.dumps({**fields, "sequence_number": 0})
        failed = {"status": "failed", "error": {"code": code, "message": message}}
        response = {**self._response, **failed, "output": self._output.to_list()}
        return self._frames([("failed", {"response": response})])

    def _frames(self, events: Iterable[Event]) -> bytes:
        frames = []
        for name, fields in events:
            kind = f"response.{name}"
            data = {"type": kind, "sequence_number": self._number, **fields}
            frames.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data)))
            self._number += 1
        return b"".join(frames)

    def _events(self, news: News) -> Iterable[Event]:
        if self.request.shows_tokens:
            self._token_ids += news.token_ids
        pieces: Iterable[Piece] = pieces_of(news)
        if self._is_forced:
            pieces = self._call_pieces(pieces, is_over=news.finish_reason == "stop")
        yield from self._output.take(self._blocks.take(pieces), self._logprobs(news))

    def _call_pieces(self, pieces: Iterable[Piece], *, is_over: bool) -> Iterable[Piece]:
        """A forced text as the call that it is. ``is_over``: the text ends here."""
        for kind, call, text in pieces:
            if kind != "text":
                yield kind, call, text
                continue
            yield from self._begin_call()
            yield "arguments", 0, text
        if is_over:
            yield from self._begin_call()
            yield "end", 0, ""

    def _begin_call(self) -> Iterable[Piece]:
        if self._forced is not None:
            yield "name", 0, self._forced
            self._forced = None

    def _last_events(self, news: News) -> Iterable[Event]:
        yield from self._output.take(self._blocks.end())
        yield from self._output.end(is_cut=news.finish_reason == "length")

    def _logprobs(self, news: News) -> list[dict[str, Any]]:
        if news.logprobs is None:
            return []
        num_top = self.request.sampling["logprobs"]
        entries = chat_logprobs(news.logprobs, self._model.token_texts, num_top, False)
        content: list[dict[str, Any]] = entries["content"]
        return content

    def _raw_message(self, token_ids: list[int]) -> dict[str, Any]:
        """Tokens, and their text with the special ones among them."""
        text = self._model.engine.tokenizer.decode(token_ids, False)
        return {"type": "raw_message_tokens", "message": text, "tokens": token_ids}

    # ------------------------------------------------------------------ the whole answer

    def whole(self, news: Sequence[News], usage: Usage) -> bytes:
        [one] = news
        for _ in self._events(one):
            pass
        for _ in self._last_events(one):
            pass
        return orjson.dumps(self._finish(one))

    def _finish(self, news: News) -> dict[str, Any]:
        """The response that is over."""
        response = self._response
        response["status"] = "completed"
        response["completed_at"] = int(time.time())
        if news.finish_reason == "length":
            response["status"] = "incomplete"
            response["completed_at"] = None
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["output"] = self._output.to_list()
        response["usage"] = {
            "input_tokens": news.num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": news.num_cached_tokens,
                "cache_write_tokens": num_written(self._model.engine, news),
            },
            "output_tokens": news.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": news.num_reasoning_tokens},
            "total_tokens": news.num_prompt_tokens + news.num_output_tokens,
        }
        if self.request.shows_tokens:
            response["input_messages"] = [self._raw_message(list(self.prompts[0]))]
            response["output_messages"] = [self._raw_message(self._token_ids)]
        calls = self._blocks.calls
        num_whole = sum(block.is_whole for block in calls)
        self._model.count_calls(self.request.tools.use, len(calls), num_whole)
        if self.keep is not None:
            self.keep(response)
        return response
