"""POST /v1/chat/completions: the chat dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from octavo.engine.limits import truncate
from octavo.server.openai.dialect import OpenAiDialect, OpenAiReply
from octavo.server.openai.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.openai.protocol import ChatRequest, parse_chat
from octavo.server.work.answer import answer
from octavo.server.work.prompts import encode_chat

if TYPE_CHECKING:
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
        prompt = await encode_chat(model, request.conversation)
        prompt = truncate(prompt, request.truncate_prompt_tokens, model.engine.max_model_len)
        return ChatReply(request, model, request_id, [prompt])


class ChatReply(OpenAiReply):
    """Messages: a role, then content."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

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

    def text_choice(
        self, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text},
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def decorate(self, choice: dict[str, Any], index: int, news: News) -> None:
        if news.logprobs is not None:
            choice["logprobs"] = chat_logprobs(
                news.logprobs,
                self._texts,
                self.request.sampling["logprobs"],
                bool(self.request.return_tokens_as_token_ids),
            )
        if self.request.return_token_ids:
            choice["token_ids"] = news.token_ids

    def whole_choice(self, index: int, news: News) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": news.text, **_ABSENT},
            "logprobs": None,
            "finish_reason": news.finish_reason,
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
