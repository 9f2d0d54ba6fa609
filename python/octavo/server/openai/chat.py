"""POST /v1/chat/completions: the chat dialect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from octavo.engine.limits import truncate
from octavo.server.openai.chat_message import ChatMessage
from octavo.server.openai.dialect import OpenAiDialect, OpenAiReply
from octavo.server.openai.functions import older_deltas, older_message
from octavo.server.openai.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.openai.protocol import ChatRequest, parse_chat
from octavo.server.work.answer import answer
from octavo.server.work.chat import ChatPlan, plan_chat
from octavo.server.work.prompts import encode_chat
from octavo.server.work.usage import timings_object
from octavo.text.tools import num_tool_calls

if TYPE_CHECKING:
    from octavo._core import Piece, TokenIds
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.dialect import Dialect
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState
    from octavo.server.work.usage import Usage

# Keys that vLLM writes into every message, whose clients read them unasked.
_ABSENT: Final[dict[str, Any]] = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": [],
    "reasoning": None,
    "reasoning_content": None,
}


class ChatDialect(OpenAiDialect):
    """Messages in, one message out."""

    def parse(self, body: Mapping[str, Any]) -> ChatRequest:
        """See ``parse_chat``."""
        return parse_chat(body)

    async def reply(self, request: ChatRequest, model: ServedModel, request_id: str) -> ChatReply:
        """Render the conversation.

        Raises:
            InvalidRequestError: the template refuses it, or it is longer than any that fits.
        """
        use, conversation = request.tool_use, request.conversation
        if use.mode == "none" and model.config.exclude_tools_when_tool_choice_none:
            conversation.tools = []
        prompt = await encode_chat(model, conversation)
        token_ids = truncate(
            prompt.token_ids,
            request.truncate_prompt_tokens,
            model.engine.max_model_len,
            request.truncation_side,
        )
        plan = await plan_chat(
            model,
            conversation,
            prompt,
            use,
            request.thinking_token_budget,
            request.sampling,
        )
        return ChatReply(request, model, request_id, [token_ids], plan)


class ChatReply(OpenAiReply):
    """Messages: a role, then reasoning, content and calls as they come."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"
    request: ChatRequest

    def __init__(
        self,
        request: ChatRequest,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[TokenIds],
        plan: ChatPlan,
    ) -> None:
        super().__init__(request, model, request_id, prompts, plan)
        self._model = model
        # By sample, those that have sent pieces.
        self._messages: dict[int, ChatMessage] = {}

    def _message(self, index: int) -> ChatMessage:
        message = self._messages.get(index)
        if message is None:
            message = self._messages[index] = ChatMessage(
                self._model.chat_format.tool_calls,
                num_tool_calls(self.request.conversation.messages),
                shows_reasoning=self.request.include_reasoning,
            )
        return message

    def _finish_reason(self, index: int, news: News) -> str | None:
        """The engine's; "tool_calls", or its older name, where a stop follows a call that the
        request did not name."""
        message = self._messages.get(index)
        has_calls = message is not None and message.num_calls > 0
        if has_calls and news.finish_reason == "stop" and self.request.tool_use.mode != "named":
            return "function_call" if self.request.uses_functions else "tool_calls"
        return news.finish_reason

    def start(self, index: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        fields = self.first_usage(index)
        if self.request.return_token_ids:
            fields["prompt_token_ids"] = list(self.prompts[0])
        return self.chunk_event([choice], **fields)

    def _count_calls(self, message: ChatMessage) -> None:
        self._model.count_calls(self.request.tool_use, message.num_calls, message.num_ended)

    def text(self, index: int, news: News) -> bytes:
        """The chunks of all pieces: one chunk where there are no channels."""
        if news.pieces is None:
            return super().text(index, news)
        return self._piece_events(index, news, self._deltas(index, news.pieces))

    def _deltas(self, index: int, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        deltas = self._message(index).deltas(pieces)
        return older_deltas(deltas) if self.request.uses_functions else deltas

    def end(self, index: int, news: News) -> bytes:
        """The chunks of what is left, and the one with the finish reason."""
        if news.pieces is None:
            return super().end(index, news)
        message = self._message(index)
        deltas = self._deltas(index, news.pieces)
        self._count_calls(message)
        # The last text may travel with the reason, as it does without channels.
        is_text = bool(deltas) and "content" in deltas[-1] and not message.num_calls
        last = deltas.pop() if is_text else {}
        frames = self._piece_events(index, news, deltas) if deltas else b""
        choice = self._delta_choice(index, last)
        choice["finish_reason"] = self._finish_reason(index, news)
        choice["stop_reason"] = news.stop_reason
        if not deltas:
            self.decorate(choice, index, news)
        return frames + self._news_event([choice], news, timings=timings_object(news))

    def _piece_events(self, index: int, news: News, deltas: list[dict[str, Any]]) -> bytes:
        """A chunk for each delta; the first carries the news' logprobs and token ids."""
        choices = [self._delta_choice(index, delta) for delta in deltas]
        if not choices:
            # Tokens of a marker: there is something to report beside text, or nothing at all.
            if news.logprobs is None and not self.request.return_token_ids:
                return b""
            choices = [self._delta_choice(index, {})]
        self.decorate(choices[0], index, news)
        return b"".join(self._news_event([choice], news) for choice in choices)

    def _delta_choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def reasoning_choice(self, index: int, text: str) -> dict[str, Any] | None:
        if self.plan.channels is None or not self.request.include_reasoning:
            return None
        return self._delta_choice(index, {"reasoning": text, "reasoning_content": text})

    def text_choice(
        self, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        choice = self._delta_choice(index, {"content": text})
        choice["finish_reason"], choice["stop_reason"] = finish_reason, stop_reason
        return choice

    def decorate(self, choice: dict[str, Any], index: int, news: News) -> None:
        if news.logprobs is not None:
            choice["logprobs"] = chat_logprobs(
                news.logprobs,
                self._texts,
                self.request.sampling["logprobs"],
                bool(self.request.return_tokens_as_token_ids),
                "logprob_token_ids" in self.request.sampling,
            )
        if self.request.return_token_ids:
            choice["token_ids"] = news.token_ids

    def whole_choice(self, index: int, news: News) -> dict[str, Any]:
        if news.pieces is None:
            own: dict[str, Any] = {"content": news.text}
        else:
            message = self._message(index)
            own = message.whole(news.pieces)
            if self.request.uses_functions:
                own = older_message(own)
            self._count_calls(message)
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": None, **_ABSENT, **own},
            "logprobs": None,
            "finish_reason": self._finish_reason(index, news),
            "stop_reason": news.stop_reason,
            "token_ids": None,
        }
        self.decorate(choice, index, news)
        return choice

    def whole_object(self, news: Sequence[News], usage: Usage) -> dict[str, Any]:
        answer = super().whole_object(news, usage)
        answer["prompt_logprobs"] = answer["prompt_token_ids"] = None
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = list(self.prompts[0])
        if self.request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self.scores[0], self._texts, self.request.prompt_logprobs
            )
        return answer


CHAT: Final[Dialect[ChatRequest]] = ChatDialect()


async def chat_completions(state: ServerState, exchange: Exchange) -> None:
    """Answer one conversation, ``n`` times."""
    await answer(CHAT, state, exchange)
