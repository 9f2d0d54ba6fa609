"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState


def _model_object(state: ServerState, name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created_s,
        "owned_by": "octavo",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.engine.max_model_len,
        # What it is for: the page shows what fits.
        "task": "generate" if model.engine.pooling is None else model.engine.pooling.task,
        # Codex' name for it.
        "context_window": model.engine.max_model_len,
    }


async def list_models(state: ServerState, exchange: Exchange) -> None:
    """Every name that a model is served under."""
    data = [_model_object(state, name, model) for name, model in state.models().items()]
    await exchange.respond_json({"object": "list", "data": data})


async def get_model(state: ServerState, exchange: Exchange) -> None:
    """One of them; names may hold slashes."""
    name = exchange.path_params["name"]
    await exchange.respond_json(_model_object(state, name, state.model(name)))
