"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any

from octavo.pooling import vector_size
from octavo.server.pooling.pool import (
    cut_vectors,
    encoded_inputs,
    pool,
    prompt_of,
    render_json,
    usage,
    vector_form,
)
from octavo.server.pooling.protocol import parse_embedding

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def embeddings(state: ServerState, exchange: Exchange) -> None:
    """One vector a text."""
    request = await exchange.read(parse_embedding)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling("embed")
    size = vector_size(info, request.dimensions, "dimensions")
    texts = await encoded_inputs(engine, request, prompt_of(request, info))
    pooled = await pool(state, exchange, engine, request, texts, "input")
    form = vector_form(request)
    about = {
        "id": f"embd-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model or model.names[0],
        "usage": usage(texts),
    }
    if not form.is_json:
        rows = list(cut_vectors(pooled, info, size))
        await exchange.respond(await asyncio.to_thread(form.response, rows, about))
        return

    def body() -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": form.in_json(row)}
            for index, row in enumerate(cut_vectors(pooled, info, size))
        ]
        return {**about, "data": data}

    await exchange.respond_body(await render_json(body, len(texts) * size))
