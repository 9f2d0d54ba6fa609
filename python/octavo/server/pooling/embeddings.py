"""POST /v1/embeddings."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from octavo.pooling import vector_size
from octavo.server.pooling.pool import (
    base64_text,
    cut_vectors,
    encoded_inputs,
    pool,
    prompt_of,
    render_json,
    usage,
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
    is_base64 = request.encoding_format == "base64"

    def body() -> dict[str, Any]:
        return {
            "id": f"embd-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64_text(row) if is_base64 else row,
                }
                for index, row in enumerate(cut_vectors(pooled, info, size))
            ],
            "usage": usage(texts),
        }

    await exchange.respond_body(await render_json(body, len(texts) * size))
