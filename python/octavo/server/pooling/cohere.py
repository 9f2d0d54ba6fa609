"""POST /v2/embed: embeddings in Cohere's form, as vLLM has it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidParameterError, RequestTooLongError, UnsupportedParameterError
from octavo.pooling import vector_size
from octavo.server.pooling.forms import VectorForm, quantized
from octavo.server.pooling.pool import (
    cut_vectors,
    encoded_texts,
    pool,
    prompted,
    render_json,
    usage,
)
from octavo.server.pooling.protocol import parse_cohere_embed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def embed(state: ServerState, exchange: Exchange) -> None:
    """One vector a text, in each of the forms asked for."""
    request = await exchange.read(parse_cohere_embed)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling("embed")
    size = vector_size(info, request.output_dimension, "output_dimension")
    types = dict.fromkeys(request.embedding_types)
    if size % 8 and not types.keys().isdisjoint(("binary", "ubinary")):
        raise InvalidParameterError(
            f"embedding_types: vectors of {size} numbers are no whole bytes", "embedding_types"
        )
    if not info.normalizes and not types.keys().isdisjoint(("int8", "uint8")):
        raise UnsupportedParameterError(
            "embedding_types: int8 and uint8 are not supported: this model's vectors do not have "
            "length 1, so that their numbers have no bounds",
            "embedding_types",
        )
    most = min(request.max_tokens or engine.max_model_len, engine.max_model_len)
    side = {"START": "left", "END": "right"}.get(request.truncate)
    prompt = info.prompts.find_for(request.input_type)
    inputs = prompted(request.texts, prompt)
    texts = await encoded_texts(engine, inputs, None if side is None else most, "texts", side=side)
    for text in texts:
        if len(text.token_ids) > most:
            raise RequestTooLongError(len(text.token_ids), most, "texts")
    pooled = await pool(state, exchange, engine, request, texts, "texts")

    num_tokens = usage(texts)["prompt_tokens"]

    def body() -> dict[str, Any]:
        rows = cut_vectors(pooled, info, size)
        return {
            "id": f"embd-{secrets.token_hex(16)}",
            "embeddings": {kind: _written(rows, kind) for kind in types},
            "texts": request.texts,
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": num_tokens, "image_tokens": 0},
                "tokens": {"input_tokens": num_tokens},
            },
            "response_type": "embeddings_by_type",
        }

    await exchange.respond_body(await render_json(body, len(texts) * size * len(types)))


def _written(rows: NDArray[np.float32], kind: str) -> Any:
    """Vectors in one of Cohere's forms."""
    if kind == "base64":
        return [VectorForm(endianness="little").base64(row) for row in rows]
    return rows if kind == "float" else quantized(rows, kind)
