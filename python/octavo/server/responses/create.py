"""POST /v1/responses and /v1/responses/input_tokens: the dialect of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from octavo.errors import RequestTooLongError, ResponseNotFoundError
from octavo.server.openai.errors import error_body
from octavo.server.responses.items import as_messages, check_references, oldest_first_cuts
from octavo.server.responses.protocol import encoded, parse_input_tokens, parse_response
from octavo.server.responses.reply import ResponsesReply
from octavo.server.work.agent_prompt import encode_turns, plan_turns
from octavo.server.work.answer import answer
from octavo.server.work.request import Conversation
from octavo.server.work.response_store import ItemTurn
from octavo.server.work.skipped import warn_skipped
from octavo.text.tools import ToolUse

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.responses.protocol import ResponsesRequest
    from octavo.server.work.prompts import ChatPrompt
    from octavo.server.work.response_store import StoredResponse
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState

# An answer's room in a conversation that is truncated for it, where the request names no other; a
# quarter of the context at most.
_ROOM: Final = 1024


class ResponsesDialect:
    """Items in, items out. Made for each exchange: what is kept belongs to its key."""

    media_type = "text/event-stream; charset=utf-8"
    ping = early_ping = b": ping\n\n"
    error_body = staticmethod(error_body)

    def __init__(self, state: ServerState, exchange: Exchange) -> None:
        self._store = state.responses if state.config.response_store else None
        self._owner = state.api_keys.owner(exchange.scope)
        self._exchange = exchange

    def parse(self, body: Mapping[str, Any]) -> ResponsesRequest:
        """See ``parse_response``."""
        return parse_response(body)

    async def reply(
        self, request: ResponsesRequest, model: ServedModel, request_id: str
    ) -> ResponsesReply:
        """Render the conversation, which may have begun with earlier responses.

        Raises:
            InvalidRequestError: the template refuses it, or it is longer than any that fits.
            ResponseNotFoundError: it goes on from a response that is not kept.
        """
        previous = self._previous(request)
        items = self._resolved(request.items)
        prompt, conversation = await self._prompt(request, model, previous, items)
        # A text that a grammar forces is a call's, whatever it looks like.
        use = request.tools.use if request.tools.forced_text is None else ToolUse()
        plan = await plan_turns(
            model, conversation, prompt, use, request_id, sampling=request.sampling
        )
        reply = ResponsesReply(
            request, model, request_id, prompt.token_ids, plan, conversation.messages
        )
        store = self._store
        if store is not None and request.is_stored:
            turn = ItemTurn(encoded("input", items), [item["id"] for item in items])
            reply.keep = lambda response: store.put(self._owner, response, turn, previous)
        return reply

    async def count(self, request: ResponsesRequest, model: ServedModel) -> int:
        """The number of a prompt's tokens.

        Raises:
            As ``reply``.
        """
        items = self._resolved(request.items)
        prompt, _ = await self._prompt(request, model, self._previous(request), items)
        return len(prompt.token_ids)

    def _previous(self, request: ResponsesRequest) -> StoredResponse | None:
        if request.previous_response_id is None:
            return None
        name = "previous_response_id"
        if self._store is None:
            raise ResponseNotFoundError(request.previous_response_id, name)
        return self._store.get(self._owner, request.previous_response_id, name)

    def _resolved(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = [item["id"] for item in items if item["type"] == "item_reference"]
        if not ids:
            return list(items)
        found = {} if self._store is None else self._store.find_items(self._owner, ids)
        return check_references(items, found)

    async def _prompt(
        self,
        request: ResponsesRequest,
        model: ServedModel,
        previous: StoredResponse | None,
        items: list[dict[str, Any]],
    ) -> tuple[ChatPrompt, Conversation]:
        """Render the items; where they may be dropped, as many of the latest as fit."""
        earlier = [] if previous is None else previous.items()
        skipped = [*request.tools.skipped]
        messages = [*as_messages(earlier, []), *as_messages(items, skipped)]
        warn_skipped(self._exchange, skipped)
        cuts = oldest_first_cuts([*earlier, *items]) if request.truncates else [0]
        max_model_len = model.engine.max_model_len
        room = min(request.sampling.get("max_tokens", _ROOM), max_model_len // 4)

        async def render(cut: int) -> tuple[ChatPrompt, Conversation]:
            conversation = _conversation(request, messages, cut)
            return await encode_turns(model, conversation, request.tools.use), conversation

        # By halves: each look is a render.
        least, most = 0, len(cuts) - 1
        while least < most:
            middle = (least + most) // 2
            try:
                found = await render(cuts[middle])
            except RequestTooLongError:
                least = middle + 1
                continue
            if len(found[0].token_ids) + room > max_model_len:
                least = middle + 1
            elif middle == least:
                return found
            else:
                most = middle
        return await render(cuts[least])


def _conversation(
    request: ResponsesRequest, messages: Sequence[dict[str, Any] | None], cut: int
) -> Conversation:
    """The messages from ``cut`` on, after the system's, which are never dropped."""
    kept = [
        message
        for index, message in enumerate(messages)
        if message is not None and (index >= cut or message["role"] in ("system", "developer"))
    ]
    if request.instructions:
        kept = [{"role": "system", "content": request.instructions}, *kept]
    if all(message["role"] in ("system", "developer") for message in kept):
        # Clients try a server with nothing to say.
        kept.append({"role": "user", "content": ""})
    return Conversation(
        messages=kept, tools=request.tools.use.definitions, reasoning_effort=request.effort
    )


async def create(state: ServerState, exchange: Exchange) -> None:
    """Answer one conversation, in the form of a response."""
    await answer(ResponsesDialect(state, exchange), state, exchange)


async def input_tokens(state: ServerState, exchange: Exchange) -> None:
    """The number of tokens of a conversation, rendered as it would be for an answer."""
    request = await exchange.read(parse_input_tokens)
    model = state.model(request.model)
    model.check_generates()
    count = await ResponsesDialect(state, exchange).count(request, model)
    await exchange.respond_json({"object": "response.input_tokens", "input_tokens": count})
