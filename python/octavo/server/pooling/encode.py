"""POST /pooling: a pooling model's output for texts, whatever its task; vLLM's route."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.late_interaction import form_of
from octavo.pooling import PoolingTask, cut, probabilities, vector_size
from octavo.server.pooling.pool import (
    encoded_inputs,
    pool,
    prompt_of,
    render_json,
    usage,
    vector_form,
)
from octavo.server.pooling.protocol import EncodeRequest, parse_encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo.pooling import Pooled, PoolingInfo
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def encode(state: ServerState, exchange: Exchange) -> None:
    """Each text's vector, or its tokens' vectors, or a classifier's probabilities."""
    request = await exchange.read(parse_encode)
    model = state.model_for_work(request.model)
    engine, info = model.engine, model.pooling(*get_args(PoolingTask))
    _check_task(request, info)
    form_of_texts = form_of(info, request.embedding_mode)
    prompt = prompt_of(request, info)
    texts = await encoded_inputs(engine, request, prompt, form_of_texts)
    pooled = await pool(state, exchange, engine, request, texts, "input")
    form = vector_form(request)
    rows = _rows(pooled, info, request)
    about = {
        "id": f"pool-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model or model.names[0],
        "usage": usage(texts),
    }
    if not form.is_json:
        await exchange.respond(await asyncio.to_thread(form.response, rows, about))
        return

    def body() -> dict[str, Any]:
        data = [
            {"object": "pooling", "index": index, "data": form.in_json(row)}
            for index, row in enumerate(rows)
        ]
        return {**about, "data": data}

    await exchange.respond_body(await render_json(body, sum(row.size for row in rows)))


def _check_task(request: EncodeRequest, info: PoolingInfo) -> None:
    """Raises UnsupportedParameterError for what this model does not do."""
    # A cross-encoder is a classifier of one label.
    tasks = ("classify", "score") if info.task == "score" else (info.task,)
    if request.task is not None and request.task not in tasks:
        raise UnsupportedParameterError(
            f"task: this model does not {request.task}; its task is {info.task}", "task"
        )
    if request.dimensions is not None:
        if not info.embeds:
            raise InvalidParameterError("dimensions needs a model that embeds", "dimensions")
        vector_size(info, request.dimensions, "dimensions")
    if info.normalizes and not request.use_activation:
        raise UnsupportedParameterError(
            "use_activation: false is not supported: this model's vectors have length 1",
            "use_activation",
        )


def _rows(pooled: Sequence[Pooled], info: PoolingInfo, request: EncodeRequest) -> Sequence[Pooled]:
    """Of each text its vector, or a vector a token, or a number for each label; float32."""
    if info.embeds:
        size = vector_size(info, request.dimensions, "dimensions")
        return [cut(values, info, size) for values in pooled]
    activation = info.activation if request.use_activation else "identity"
    if info.is_per_token:
        return [np.array([probabilities(row, activation) for row in rows]) for rows in pooled]
    return [np.array(probabilities(logits, activation), np.float32) for logits in pooled]
