"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from octavo.errors import InvalidParameterError
from octavo.server.http import limits
from octavo.server.openai.protocol import parse_detokenize, parse_tokenize
from octavo.server.work.prompts import INLINE_CHARS, encode, encode_chat

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


async def tokenize(state: ServerState, exchange: Exchange) -> None:
    """The token ids of a prompt or of a rendered conversation."""
    request = await exchange.read(parse_tokenize)
    model = state.model(request.model)
    engine = model.engine
    if request.conversation is not None:
        tokens = (await encode_chat(model, request.conversation)).token_ids
    else:
        tokens = await encode(engine, request.prompt, request.add_special_tokens)
    strings = None
    if request.return_token_strs:
        strings = [engine.tokenizer.id_to_token(token_id) for token_id in tokens]
    await exchange.respond_json(
        {
            "count": len(tokens),
            "max_model_len": engine.max_model_len,
            "tokens": list(tokens),
            "token_strs": strings,
        }
    )


async def tokenizer_info(state: ServerState, exchange: Exchange) -> None:
    """Facts by which a client prepares texts as this model reads them, in transformers' words."""
    model = state.model()
    engine = model.engine
    await exchange.respond_json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": engine.max_model_len,
            **engine.special_tokens,
            "chat_template": model.template_source,
        }
    )


async def detokenize(state: ServerState, exchange: Exchange) -> None:
    """The text of token ids, special tokens included."""
    request = await exchange.read(parse_detokenize)
    engine = state.model(request.model).engine
    tokenizer, tokens = engine.tokenizer, request.tokens
    # No text of the model's is longer.
    limits.check_count("tokens", tokens, engine.max_model_len)
    if tokens and max(tokens) >= tokenizer.vocab_size:
        raise InvalidParameterError(
            f"tokens must hold ids in [0, {tokenizer.vocab_size})", "tokens"
        )
    if len(tokens) <= INLINE_CHARS:
        text = tokenizer.decode(tokens, False)
    else:
        text = await asyncio.to_thread(tokenizer.decode, tokens, False)
    await exchange.respond_json({"prompt": text})
