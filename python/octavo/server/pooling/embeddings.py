"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from octavo.errors import InvalidParameterError
from octavo.server.pooling.pool import encoded_inputs, pool, usage
from octavo.server.pooling.protocol import EmbeddingRequest, parse_embedding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState

# Writing this many numbers takes about a millisecond; more leave the event loop.
_INLINE_VALUES: Final = 20_000


async def embeddings(state: ServerState, exchange: Exchange) -> None:
    """One vector a text."""
    request = await exchange.read(parse_embedding)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling("embed")
    size = request.dimensions or info.size
    if size > info.size:
        raise InvalidParameterError(
            f"dimensions must be at most {info.size}, the size of this model's vectors, not {size}",
            "dimensions",
        )
    texts = await encoded_inputs(engine, request)
    vectors = await pool(state, exchange, engine, request, texts, "input")

    def render() -> bytes:
        rows = np.stack([vector[:size] for vector in vectors])
        if info.normalizes and size < info.size:
            # What is left of a vector is shorter than 1.
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        body = {
            "id": f"embd-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(row, request)}
                for index, row in enumerate(rows)
            ],
            "usage": usage(texts),
        }
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    inline = len(texts) * size <= _INLINE_VALUES
    body = render() if inline else await asyncio.to_thread(render)
    await exchange.respond_body(body)


def _written(row: NDArray[np.float32], request: EmbeddingRequest) -> Any:
    """A vector in the format asked for; base64 is of little-endian float32."""
    if request.encoding_format == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return row
