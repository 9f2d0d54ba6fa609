"""POST /pooling: a pooling model's output for texts, whatever its task; vLLM's route."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import UnsupportedParameterError
from octavo.pooling import probabilities
from octavo.server.pooling.pool import (
    base64_text,
    encoded_inputs,
    pool,
    prompt_of,
    render_json,
    usage,
)
from octavo.server.pooling.protocol import EncodeRequest, parse_encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.pooling import PoolingInfo, Vector
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def encode(state: ServerState, exchange: Exchange) -> None:
    """Each text's vector, or a classifier's probabilities."""
    request = await exchange.read(parse_encode)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling("embed", "classify", "score")
    _check_task(request, info)
    texts = await encoded_inputs(engine, request, prompt_of(request, info))
    pooled = await pool(state, exchange, engine, request, texts, "input")
    is_base64 = request.encoding_format == "base64"

    def body() -> dict[str, Any]:
        return {
            "id": f"pool-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "data": [
                {
                    "object": "pooling",
                    "index": index,
                    "data": base64_text(row) if is_base64 else row,
                }
                for index, row in enumerate(_rows(pooled, info, request.use_activation))
            ],
            "usage": usage(texts),
        }

    await exchange.respond_body(await render_json(body, len(texts) * info.size))


def _check_task(request: EncodeRequest, info: PoolingInfo) -> None:
    """Raises UnsupportedParameterError for what this model does not do."""
    # A cross-encoder is a classifier of one label.
    tasks = ("embed",) if info.task == "embed" else ("classify", info.task)
    if request.task is not None and request.task not in tasks:
        raise UnsupportedParameterError(
            f"task: this model does not {request.task}; its task is {info.task}", "task"
        )
    if info.normalizes and not request.use_activation:
        raise UnsupportedParameterError(
            "use_activation: false is not supported: this model's vectors have length 1",
            "use_activation",
        )


def _rows(pooled: Sequence[Vector], info: PoolingInfo, use_activation: bool) -> Sequence[Vector]:
    """Of each text its vector, or a number for each label; float32."""
    if info.task == "embed":
        return pooled
    activation = info.activation if use_activation else "identity"
    return [np.array(probabilities(logits, activation), np.float32) for logits in pooled]
