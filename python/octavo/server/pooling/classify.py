"""POST /classify: which of a model's labels fit a text."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from octavo.pooling import probabilities
from octavo.server.pooling.pool import encoded_inputs, pool, usage
from octavo.server.pooling.protocol import parse_classify

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def classify(state: ServerState, exchange: Exchange) -> None:
    """Each text's likeliest label, and the probabilities of all."""
    engine, info = state.engine_for_pooling("classify", "score")
    request = parse_classify(await exchange.read_json())
    model = state.model_name(request.model)
    texts = await encoded_inputs(engine, request)
    num_tokens = await pool(state, exchange, engine, request, texts, "input")
    activation = info.activation if request.use_activation else "identity"
    data = []
    for index, (_, pooled) in enumerate(texts):
        probs = probabilities(pooled, activation)
        label = info.labels[probs.index(max(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
    await exchange.respond_json(
        {
            "id": f"classify-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": data,
            "usage": usage(num_tokens),
        }
    )
