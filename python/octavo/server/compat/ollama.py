"""Ollama's /api/chat and /api/generate, over the same engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from octavo.errors import UnsupportedParameterError
from octavo.server.compat.errors import error_body
from octavo.server.compat.ollama_protocol import (
    OllamaRequest,
    model_name,
    parse_chat,
    parse_generate,
)
from octavo.server.compat.ollama_reply import OllamaReply, content, line, now
from octavo.server.work.answer import answer
from octavo.server.work.chat import PLAIN, plan_chat
from octavo.server.work.dialect import Dialect
from octavo.server.work.prompts import encode, encode_chat

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState


class OllamaDialect:
    """Base of the two routes' dialects. ``is_chat``: its answers are messages."""

    media_type = "application/x-ndjson"
    error_body = staticmethod(error_body)
    is_chat: bool
    prompt_field: str

    @property
    def ping(self) -> bytes:
        """A line that adds nothing."""
        return line(done=False, **content("", self.is_chat))

    early_ping = ping

    async def reply(
        self, request: OllamaRequest, model: ServedModel, request_id: str
    ) -> OllamaReply:
        """The prompt: a rendered conversation, or the text.

        Raises:
            InvalidRequestError: the template refuses it, or it is longer than any that fits.
        """
        conversation = request.conversation
        if conversation is None:
            token_ids = await encode(model.engine, request.text, True)
            return OllamaReply(request, model, [token_ids], PLAIN, self)
        form = model.chat_format
        if request.think:
            if form.reasoning_markers is None:
                raise UnsupportedParameterError("think is not supported by this model", "think")
            if form.toggle is not None:
                conversation.chat_template_kwargs[form.toggle] = True
        prompt = await encode_chat(model, conversation)
        use, sampling = request.tool_use, request.sampling
        plan = await plan_chat(model, conversation, prompt, use, sampling=sampling)
        return OllamaReply(request, model, [prompt.token_ids], plan, self)


class ChatDialect(OllamaDialect):
    """Messages in, one message out."""

    is_chat = True
    prompt_field = "messages"

    def parse(self, body: Mapping[str, Any]) -> OllamaRequest:
        """See ``parse_chat``."""
        return parse_chat(body)


class GenerateDialect(OllamaDialect):
    """A prompt in, its answer out; with ``raw`` its continuation."""

    is_chat = False
    prompt_field = "prompt"

    def parse(self, body: Mapping[str, Any]) -> OllamaRequest:
        """See ``parse_generate``."""
        return parse_generate(body)

    async def reply(
        self, request: OllamaRequest, model: ServedModel, request_id: str
    ) -> OllamaReply:
        """As the base's; a model without a template reads the texts as they are."""
        if request.conversation is not None and not model.has_template:
            parts = [str(message["content"]) for message in request.conversation.messages]
            request.text, request.conversation = "\n\n".join(parts), None
        return await super().reply(request, model, request_id)


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
    name = model_name("model", body.get("model"))
    state.model_for_work(name)
    await exchange.respond_json(
        {
            "model": name,
            "created_at": now(),
            **content("", field == "messages"),
            "done": True,
            # It stays loaded: there is no other that needs the memory.
            "done_reason": "unload" if body.get("keep_alive") in (0, "0", "0s") else "load",
        }
    )
    return True
