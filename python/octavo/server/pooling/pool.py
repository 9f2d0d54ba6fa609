"""Texts through a pooling model, batched with those of every other client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from octavo._core import TokenIds
from octavo.errors import InvalidParameterError, RequestTooLongError
from octavo.pooling import NO_TOKENS, EncodedText, encode_text, max_text_len
from octavo.server.work.generation import Generation
from octavo.server.work.prompts import INLINE_CHARS, MAX_CHARS_PER_TOKEN

if TYPE_CHECKING:
    from octavo.engine.engine import AsyncEngine
    from octavo.pooling import Vector
    from octavo.server.http.exchange import Exchange
    from octavo.server.pooling.protocol import ClassifyRequest, EmbeddingRequest, PoolingRequest
    from octavo.server.work.state import ServerState

T = TypeVar("T")


async def pool(
    state: ServerState,
    exchange: Exchange,
    engine: AsyncEngine,
    request: PoolingRequest,
    texts: Sequence[EncodedText],
    param: str,
) -> list[Vector]:
    """Every text's vector. ``param``: the field that the texts came in.

    Raises:
        OctavoError: nothing has been written yet.
        ClientDisconnect: there is nobody to write to; what is left is aborted.
    """
    for text in texts:
        if len(text.token_ids) > engine.max_model_len:
            raise RequestTooLongError(len(text.token_ids), engine.max_model_len, param)
    with Generation(engine, exchange.connection, state.generations) as generation:
        try:
            generation.submit(
                [TokenIds(text.token_ids) for text in texts],
                NO_TOKENS,
                delivery="final",
                priority=request.priority,
                num_first=[text.num_first for text in texts],
            )
        except InvalidParameterError as error:
            if error.param == "prompt":  # the engine's name for it
                error.param = param
            raise
        return [delta.extra for delta in await generation.collect()]


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
) -> list[EncodedText]:
    """Each text of ``input``, off the event loop where these are long."""
    most = max_text_len(request.truncate_prompt_tokens, engine.max_model_len)
    tokenizer, special = engine.tokenizer, request.add_special_tokens

    def encode() -> list[EncodedText]:
        return [
            EncodedText(
                encode_text(tokenizer, one, most, special) if isinstance(one, str) else one[:most]
            )
            for one in request.inputs
        ]

    strings = [one for one in request.inputs if isinstance(one, str)]
    return await encoded(engine, strings, most, "input", encode)


def usage(texts: Sequence[EncodedText]) -> dict[str, int]:
    """OpenAI's ``usage`` of a request that generates nothing."""
    num_tokens = sum(len(text.token_ids) for text in texts)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
