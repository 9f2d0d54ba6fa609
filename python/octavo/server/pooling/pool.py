"""Texts through a pooling model, batched with those of every other client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import orjson

from octavo._core import TokenIds
from octavo.errors import InvalidParameterError, RequestTooLongError
from octavo.late_interaction import encode_form
from octavo.pooling import NO_TOKENS, EncodedText, cut, encode_text, max_text_len
from octavo.server.pooling.forms import VectorForm
from octavo.server.work.generation import Generation
from octavo.server.work.prompts import INLINE_CHARS, MAX_CHARS_PER_TOKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.engine.engine import AsyncEngine
    from octavo.pooling import Pooled, PoolingInfo, Vector
    from octavo.server.http.exchange import Exchange
    from octavo.server.http.fields import Prompt
    from octavo.server.pooling.protocol import (
        ClassifyRequest,
        EmbeddingRequest,
        EncodeRequest,
        PoolingRequest,
    )
    from octavo.server.work.state import ServerState
    from octavo.text_form import TextForm

# Writing this many numbers takes about a millisecond; more leave the event loop.
INLINE_VALUES: Final = 20_000

T = TypeVar("T")


async def pool(
    state: ServerState,
    exchange: Exchange,
    engine: AsyncEngine,
    request: PoolingRequest,
    texts: Sequence[EncodedText],
    param: str,
) -> list[Pooled]:
    """Every text's vector, or vectors. ``param``: the field that the texts came in.

    Raises:
        OctavoError: nothing has been written yet.
        ClientDisconnect: there is nobody to write to; what is left is aborted.
    """
    for text in texts:
        if len(text.token_ids) > engine.max_model_len:
            raise RequestTooLongError(len(text.token_ids), engine.max_model_len, param)
    with Generation(engine, exchange.connection, state.generations, exchange.trace) as generation:
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
        deltas = await generation.collect()
        return [text.kept_of(delta.extra) for text, delta in zip(texts, deltas, strict=True)]


async def encoded(
    engine: AsyncEngine,
    texts: Sequence[str],
    most: int | None,
    param: str,
    encode: Callable[[], T],
    *,
    inline: bool = True,
) -> T:
    """``encode()``, off the event loop where these texts are long, or it is not ``inline``.

    Raises:
        RequestTooLongError: one is longer than any text that could fit, and is not to be cut.
    """
    if most is None:
        least = max(map(len, texts), default=0) // MAX_CHARS_PER_TOKEN
        if least > engine.max_model_len:
            raise RequestTooLongError(least, engine.max_model_len, param, at_least=True)
    if inline and sum(map(len, texts)) <= INLINE_CHARS:
        return encode()
    return await asyncio.to_thread(encode)


async def encoded_inputs(
    engine: AsyncEngine,
    request: EmbeddingRequest | ClassifyRequest,
    prompt: str = "",
    form: TextForm | None = None,
) -> list[EncodedText]:
    """Each text of ``input``, after ``prompt``; off the event loop where these are long.

    ``form``: of a late-interaction model's text, which cuts it in any case.

    Raises:
        InvalidParameterError: an input of token ids is to have a form.
    """
    most = max_text_len(request.truncate_prompt_tokens, engine.max_model_len)
    inputs = prompted(request.inputs, prompt)
    if form is not None:
        strings = [one for one in inputs if isinstance(one, str)]
        if len(strings) < len(inputs):
            raise InvalidParameterError("embedding_mode needs input of strings", "embedding_mode")
        limit, side = most or engine.max_model_len, request.truncation_side

        def encode_forms() -> list[EncodedText]:
            return [encode_form(engine.tokenizer, one, form, limit, side) for one in strings]

        return await encoded(engine, strings, limit, "input", encode_forms)
    return await encoded_texts(
        engine, inputs, most, "input", request.add_special_tokens, request.truncation_side
    )


def prompted(inputs: Sequence[Prompt], prompt: str) -> Sequence[Prompt]:
    """Texts after a prompt; token ids as they are."""
    if not prompt:
        return inputs
    return [prompt + one if isinstance(one, str) else one for one in inputs]


def prompt_of(request: EmbeddingRequest | EncodeRequest, info: PoolingInfo) -> str:
    """The text before each of a request's.

    Raises:
        InvalidParameterError: the model has none of that name, or an input is token ids.
    """
    for name in ("prompt_name", "prompt"):
        are_texts = all(isinstance(one, str) for one in request.inputs)
        if getattr(request, name) is not None and not are_texts:
            raise InvalidParameterError(f"{name} needs input of strings", name)
    return info.prompts.find(request.prompt_name, request.prompt)


async def encoded_texts(
    engine: AsyncEngine,
    inputs: Sequence[Prompt],
    most: int | None,
    param: str,
    add_special_tokens: bool = True,
    side: str | None = None,
) -> list[EncodedText]:
    """Each of ``inputs``, of ``most`` tokens at most; ``param``: the field that they came in.

    ``side``: see ``encode_text``.
    """
    tokenizer = engine.tokenizer

    def cut(token_ids: Sequence[int]) -> Sequence[int]:
        if most is None:
            return token_ids
        return token_ids[-most:] if side == "left" else token_ids[:most]

    def encode() -> list[EncodedText]:
        return [
            EncodedText(
                encode_text(tokenizer, one, most, add_special_tokens, side)
                if isinstance(one, str)
                else cut(one)
            )
            for one in inputs
        ]

    strings = [one for one in inputs if isinstance(one, str)]
    return await encoded(engine, strings, most, param, encode)


def cut_vectors(pooled: Sequence[Vector], info: PoolingInfo, size: int) -> NDArray[np.float32]:
    """Vectors of the texts, float32 [T, size]: the first ``size`` numbers of each."""
    return cut(np.stack(pooled), info, size)


def vector_form(request: EmbeddingRequest | EncodeRequest) -> VectorForm:
    """The form of the vectors that a request asks for."""
    return VectorForm(request.encoding_format, request.embed_dtype, request.endianness)


async def render_json(body: Callable[[], dict[str, Any]], num_values: int) -> bytes:
    """A body's JSON, written off the event loop where it holds many numbers."""

    def render() -> bytes:
        return orjson.dumps(body(), option=orjson.OPT_SERIALIZE_NUMPY)

    return render() if num_values <= INLINE_VALUES else await asyncio.to_thread(render)


def usage(texts: Sequence[EncodedText]) -> dict[str, int]:
    """OpenAI's ``usage`` of a request that generates nothing."""
    num_tokens = sum(len(text.token_ids) for text in texts)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
