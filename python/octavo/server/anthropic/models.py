"""GET /v1/models in Anthropic's form, for clients that send its version; in OpenAI's for others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from octavo.server.http.exchange import header
from octavo.server.openai import models as openai_models

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


# The header by which Anthropic's clients are known.
VERSION: Final = b"anthropic-version"


def _model_object(state: ServerState, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(state.created_s, UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": state.model(name).engine.max_model_len,
    }


def _is_anthropic(exchange: Exchange) -> bool:
    return header(exchange.scope, VERSION) is not None


async def list_models(state: ServerState, exchange: Exchange) -> None:
    """Every name that a model is served under."""
    if not _is_anthropic(exchange):
        await openai_models.list_models(state, exchange)
        return
    data = [_model_object(state, name) for name in state.models()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    await exchange.respond_json({"data": data, "has_more": False, **ends})


async def get_model(state: ServerState, exchange: Exchange) -> None:
    """One of them; names may hold slashes."""
    if not _is_anthropic(exchange):
        await openai_models.get_model(state, exchange)
        return
    name = exchange.path_params["name"]
    state.model(name)
    await exchange.respond_json(_model_object(state, name))
