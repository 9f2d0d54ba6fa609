"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo.server.openai.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.openai.protocol import ChatRequest, parse_chat
from octavo.server.work.answer import answer
from octavo.server.work.prompts import encode_chat, truncate
from octavo.server.work.wire import Wire, sse_event

if TYPE_CHECKING:
    from octavo._core import Delta, TokenIds
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


class ChatWire(Wire):
    """Messages: a role, then content."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    def __init__(
        self,
        state: ServerState,
        request: ChatRequest,
        model: str,
        request_id: str,
        prompt_token_ids: TokenIds,
    ) -> None:
        super().__init__(state, request, model, request_id)
        self._extra = (
            {"prompt_token_ids": list(prompt_token_ids)} if request.return_token_ids else {}
        )

    def first_event(self, index: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return sse_event(self.chunk([choice], **self._extra))

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

    def decorate_choice(self, choice: dict[str, Any], index: int, delta: Delta) -> None:
        if delta.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta)
        if self.request.return_token_ids:
            choice["token_ids"] = delta.token_ids

    def final_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        self.decorate_choice(choice, index, delta)
        return choice

    def answer(self, deltas: list[Delta]) -> dict[str, Any]:
        answer = {**super().answer(deltas), **self._extra}
        if self.request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self.scores[0], self.state.token_texts, self.request.prompt_logprobs
            )
        return answer

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return chat_logprobs(
            delta.logprobs or [],
            self.state.token_texts,
            self.request.sampling["logprobs"],
            self.request.return_tokens_as_token_ids,
        )


async def chat_completions(state: ServerState, exchange: Exchange) -> None:
    """Answer one conversation, ``n`` times."""
    engine = state.engine_for_work()
    request = parse_chat(await exchange.read_json(), engine.config.max_logprobs)
    model = state.model_name(request.model)
    params = request.sampling_params(engine.generation_defaults)
    prompt = await encode_chat(state, request)
    prompt = truncate(prompt, request.truncate_prompt_tokens, engine.max_model_len)
    wire = ChatWire(state, request, model, exchange.request_id, prompt)
    await answer(state, exchange, wire, [prompt], params)
