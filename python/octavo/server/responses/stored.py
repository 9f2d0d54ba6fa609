"""GET, DELETE, cancel and input_items of /v1/responses/{id}; the answer to a WebSocket's offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from octavo.errors import (
    BadRequestError,
    InvalidParameterError,
    MethodNotAllowedError,
    ResponseNotFoundError,
    RouteNotFoundError,
    UnsupportedParameterError,
    UpgradeRefusedError,
)
from octavo.server.http.exchange import header

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.response_store import StoredResponse
    from octavo.server.work.state import ServerState

_MAX_LIMIT: Final = 100
_DEFAULT_LIMIT: Final = 20


def _stored(state: ServerState, exchange: Exchange) -> StoredResponse:
    """The response that the path names, if it is this key's.

    Raises:
        ResponseNotFoundError: it is not there.
    """
    owner = state.api_keys.owner(exchange.scope)
    return state.responses.get(owner, exchange.path_params["id"])


async def get_response(state: ServerState, exchange: Exchange) -> None:
    """A stored response, as it was answered."""
    if exchange.query_params.get("stream") in ("true", "1"):
        raise UnsupportedParameterError(
            "stream is for responses in the background, of which there are none", "stream"
        )
    await exchange.respond_body(_stored(state, exchange).response)


async def delete_response(state: ServerState, exchange: Exchange) -> None:
    """Forget a stored response."""
    name = exchange.path_params["id"]
    state.responses.delete(state.api_keys.owner(exchange.scope), name)
    await exchange.respond_json({"id": name, "object": "response", "deleted": True})


async def cancel_response(state: ServerState, exchange: Exchange) -> None:
    """Refused: a response ends with its connection, and none is in the background."""
    _stored(state, exchange)
    raise BadRequestError("Cannot cancel a synchronous response.")


async def compact(state: ServerState, exchange: Exchange) -> None:
    """Refused as a path that is not there: clients then compact by themselves."""
    raise RouteNotFoundError("responses are not compacted here")


async def list_input_items(state: ServerState, exchange: Exchange) -> None:
    """The items that went into a response, the latest first."""
    items = _stored(state, exchange).input_items()
    query = exchange.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidParameterError("order must be asc or desc", "order")
    text = query.get("limit", str(_DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= _MAX_LIMIT):
        raise InvalidParameterError(f"limit must be between 1 and {_MAX_LIMIT}", "limit")
    if order == "desc":
        items.reverse()
    if (after := query.get("after")) is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ResponseNotFoundError(after, "after")
        items = items[places[0] + 1 :]
    page = items[: int(text)]
    await exchange.respond_json(_list_object(page, has_more=len(page) < len(items)))


def _list_object(page: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": has_more,
    }


async def refuse_websocket(state: ServerState, exchange: Exchange) -> None:
    """Refuse a WebSocket with the one status at which Codex falls back to HTTP at once."""
    # The connection has taken the offer off the head before it got here.
    if header(exchange.scope, b"sec-websocket-key") is not None:
        raise UpgradeRefusedError
    raise MethodNotAllowedError("GET needs the id of a response", "POST")
