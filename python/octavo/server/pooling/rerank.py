"""POST /v1/score and /v1/rerank: scores of pairs of texts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.errors import UnsupportedParameterError
from octavo.late_interaction import max_sim, scored_pairs, scored_texts
from octavo.pooling import EncodedText, cosine, cut_text, encode_pair, max_text_len, squash
from octavo.server.pooling.pool import INLINE_VALUES, encoded, pool, usage
from octavo.server.pooling.protocol import (
    RerankRequest,
    ScoreRequest,
    parse_rerank,
    parse_score,
)

if TYPE_CHECKING:
    from octavo._core import Tokenizer
    from octavo.late_interaction import Side
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState


async def score(state: ServerState, exchange: Exchange) -> None:
    """One score a pair of texts: a cross-encoder's, or one of their vectors."""
    request = await exchange.read(parse_score)
    model = state.model_for_work(request.model)
    scores, texts = await _scores(
        state, exchange, model, request, request.firsts, request.seconds, request.names[1]
    )
    await exchange.respond_json(
        {
            "id": f"score-{secrets.token_hex(16)}",
            "object": "list",
            "created": int(time.time()),
            "model": request.model or model.names[0],
            "data": [
                {"index": index, "object": "score", "score": value}
                for index, value in enumerate(scores)
            ],
            "usage": usage(texts),
        }
    )


async def rerank(state: ServerState, exchange: Exchange) -> None:
    """Documents by how well they fit a query, the best first."""
    request = await exchange.read(parse_rerank)
    model = state.model_for_work(request.model)
    documents = request.documents
    queries = [request.query] * len(documents)
    scores, texts = await _scores(state, exchange, model, request, queries, documents, "documents")
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    results = []
    for index in order[: request.top_n or None]:
        result: dict[str, object] = {"index": index, "relevance_score": scores[index]}
        if request.return_documents:
            result["document"] = {"text": documents[index]}
        results.append(result)
    await exchange.respond_json(
        {
            "id": f"rerank-{secrets.token_hex(16)}",
            "model": request.model or model.names[0],
            "results": results,
            "usage": usage(texts),
        }
    )


async def _scores(
    state: ServerState,
    exchange: Exchange,
    model: ServedModel,
    request: ScoreRequest | RerankRequest,
    firsts: Sequence[str],
    seconds: Sequence[str],
    param: str,
) -> tuple[list[float], list[EncodedText]]:
    """The pairs' scores, and the texts that the model read for them."""
    engine, info = model.engine, model.pooling("embed", "token_embed", "score")
    tokenizer = engine.tokenizer
    most = max_text_len(request.truncate_prompt_tokens, engine.max_model_len)
    template = model.pair_template
    if template is None:
        _refuse_variables(request)
    if request.max_tokens_per_query or request.max_tokens_per_doc:
        firsts, seconds = await asyncio.to_thread(_cut, tokenizer, request, firsts, seconds)
    if info.task == "score":
        if request.truncation_side == "left":
            raise UnsupportedParameterError(
                "truncation_side: left is not supported by a cross-encoder", "truncation_side"
            )

        variables = model.chat_template_kwargs | request.variables

        def encode_pairs() -> list[EncodedText]:
            couples = zip(firsts, seconds, strict=True)
            if template is not None:
                return [template.encode(tokenizer, *each, most, variables) for each in couples]
            return [encode_pair(tokenizer, *each, most, joins=info.joins) for each in couples]

        # A query is read once per document.
        is_quick = template is None
        whole = [*firsts, *seconds]
        pairs = await encoded(engine, whole, most, param, encode_pairs, inline=is_quick)
        vectors = await pool(state, exchange, engine, request, pairs, param)
        squashes = info.squashes and request.use_activation
        return [squash(logits, squashes) for logits in vectors], pairs

    # A text that is paired several times is computed once where it is computed alone.
    def encode_plain() -> dict[Side, EncodedText]:
        side = request.truncation_side
        return scored_texts(tokenizer, info, firsts, seconds, most, side)

    # A late-interaction model cuts its texts in any case.
    limit = engine.max_model_len if info.forms else most
    plain = list(dict.fromkeys([*firsts, *seconds]))
    sides = await encoded(engine, plain, limit, param, encode_plain)
    texts = list(sides.values())
    vectors = await pool(state, exchange, engine, request, texts, param)
    done = dict(zip(sides, vectors, strict=True))
    couples = scored_pairs(info, firsts, seconds)
    compare = cosine if info.task == "embed" else max_sim

    def scores() -> list[float]:
        return [compare(done[first], done[second]) for first, second in couples]

    num_values = sum(vector.size for vector in vectors)
    if num_values <= INLINE_VALUES:
        return scores(), texts
    return await asyncio.to_thread(scores), texts


def _cut(
    tokenizer: Tokenizer,
    request: ScoreRequest | RerankRequest,
    firsts: Sequence[str],
    seconds: Sequence[str],
) -> tuple[list[str], list[str]]:
    """The texts to be paired, each of as many tokens as the request allows."""
    # A query may be there once per document.
    queries = {text: cut_text(tokenizer, text, request.max_tokens_per_query) for text in firsts}
    documents = [cut_text(tokenizer, text, request.max_tokens_per_doc) for text in seconds]
    return [queries[text] for text in firsts], documents


def _refuse_variables(request: ScoreRequest | RerankRequest) -> None:
    for name in ("instruction", "chat_template_kwargs"):
        if getattr(request, name):
            raise UnsupportedParameterError(
                f"{name} needs a cross-encoder served with --chat-template", name
            )
