"""POST /classify: probabilities of a model's labels for a text."""

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
    request = await exchange.read(parse_classify)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling("classify", "score")
    texts = await encoded_inputs(engine, request)
    vectors = await pool(state, exchange, engine, request, texts, "input")
    activation = info.activation if request.use_activation else "identity"
    data = []
    for index, logits in enumerate(vectors):
        probs = probabilities(logits, activation)
        label = info.labels[probs.index(max(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
    await exchange.respond_json(
        {
            "id": f"classify-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "data": data,
            "usage": usage(texts),
        }
    )
