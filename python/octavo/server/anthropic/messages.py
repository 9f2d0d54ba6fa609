"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.server.anthropic.errors import error_body
from octavo.server.anthropic.protocol import parse_count_tokens, parse_messages
from octavo.server.anthropic.reply import PING, MessagesReply
from octavo.server.work.agent_prompt import encode_turns, plan_turns
from octavo.server.work.answer import answer
from octavo.server.work.skipped import warn_skipped

if TYPE_CHECKING:
    from octavo.server.anthropic.protocol import MessagesRequest
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState


class MessagesDialect:
    """A conversation in, blocks out. One for each exchange, whose head tells what was skipped."""

    media_type = "text/event-stream; charset=utf-8"
    ping = PING
    # No event comes before message_start; a comment is none.
    early_ping = b": ping\n\n"
    error_body = staticmethod(error_body)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def parse(self, body: Mapping[str, Any]) -> MessagesRequest:
        """See ``parse_messages``."""
        return parse_messages(body)

    async def reply(
        self, request: MessagesRequest, model: ServedModel, request_id: str
    ) -> MessagesReply:
        """Render the conversation.

        Raises:
            InvalidRequestError: the template refuses it, or it is longer than any that fits.
        """
        warn_skipped(self._exchange, request.skipped_tools)
        conversation, use = request.conversation, request.tool_use
        prompt = await encode_turns(model, conversation, use)
        plan = await plan_turns(
            model,
            conversation,
            prompt,
            use,
            request_id,
            sampling=request.sampling,
            thinking_token_budget=request.thinking_token_budget,
        )
        return MessagesReply(request, model, request_id, prompt.token_ids, plan)


async def messages(state: ServerState, exchange: Exchange) -> None:
    """Answer one conversation, in Anthropic's form."""
    exchange.add_header(b"request-id", exchange.request_id.encode())
    await answer(MessagesDialect(exchange), state, exchange)


async def count_tokens(state: ServerState, exchange: Exchange) -> None:
    """The number of tokens of a conversation, rendered as it would be for an answer."""
    exchange.add_header(b"request-id", exchange.request_id.encode())
    request = await exchange.read(parse_count_tokens)
    model = state.model(request.model, takes_any=request.takes_any_model)
    model.check_generates()
    prompt = await encode_turns(model, request.conversation, request.tool_use)
    await exchange.respond_json({"input_tokens": len(prompt.token_ids)})
