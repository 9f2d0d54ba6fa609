"""Texts through a model that gives vectors: batched with those of every other client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from octavo._core import TokenIds
from octavo.errors import InvalidParameterError, RequestTooLongError, UnsupportedParameterError
from octavo.pooling import NO_TOKENS, PooledText, encode_text, max_text_len
from octavo.server.work.generation import Generation
from octavo.server.work.prompts import INLINE_CHARS, MAX_CHARS_PER_TOKEN

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.server.http.exchange import Exchange
    from octavo.server.pooling.protocol import ClassifyRequest, EmbeddingRequest, PoolingRequest
    from octavo.server.work.state import ServerState

T = TypeVar("T")
Text = tuple[Sequence[int], PooledText]


async def pool(
    state: ServerState,
    exchange: Exchange,
    engine: AsyncEngine,
    request: PoolingRequest,
    texts: Sequence[Text],
    param: str,
) -> int:
    """Fill every text; the number of their tokens. ``param``: the field that they came in.

    Raises:
        OctavoError: nothing has been written yet.
        ClientDisconnect: there is nobody to write to; what is left is aborted.
    """
    if request.priority and engine.config.scheduling_policy != "priority":
        raise UnsupportedParameterError(
            "priority needs a server with --scheduling-policy priority", "priority"
        )
    for token_ids, _ in texts:
        if len(token_ids) > engine.max_model_len:
            raise RequestTooLongError(len(token_ids), engine.max_model_len, param)
    with Generation(state, engine, exchange.connection) as generation:
        try:
            generation.submit(
                [TokenIds(token_ids) for token_ids, _ in texts],
                NO_TOKENS,
                delivery="final",
                priority=request.priority,
                pooled=[pooled for _, pooled in texts],
            )
        except InvalidParameterError as error:
            # What the engine calls a prompt.
            error.param = param
            raise
        await generation.collect()
    return sum(len(token_ids) for token_ids, _ in texts)


async def encoded(
    engine: AsyncEngine, texts: Sequence[str], most: int | None, param: str, encode: Callable[[], T]
) -> T:
    """``encode()``, off the event loop where these texts are long.

    Raises:
        RequestTooLongError: one is longer than any text that could fit, and is not to be cut.
    """
    if most is None:
        least = max(map(len, texts), default=0) // MAX_CHARS_PER_TOKEN
        if least > engine.max_model_len:
            raise RequestTooLongError(least, engine.max_model_len, param, at_least=True)
    if sum(map(len, texts)) <= INLINE_CHARS:
        return encode()
    return await asyncio.to_thread(encode)


async def encoded_inputs(
    engine: AsyncEngine, request: EmbeddingRequest | ClassifyRequest
) -> list[Text]:
    """Each text of ``input``, off the event loop where these are long."""
    most = max_text_len(request.truncate_prompt_tokens, engine.max_model_len)
    tokenizer, special = engine.tokenizer, request.add_special_tokens

    def encode() -> list[Text]:
        return [
            (
                encode_text(tokenizer, one, most, special) if isinstance(one, str) else one[:most],
                PooledText(),
            )
            for one in request.inputs
        ]

    strings = [one for one in request.inputs if isinstance(one, str)]
    return await encoded(engine, strings, most, "input", encode)


def usage(num_tokens: int) -> dict[str, int]:
    """OpenAI's ``usage`` of a request that generates nothing."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
