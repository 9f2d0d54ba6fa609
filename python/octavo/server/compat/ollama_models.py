"""Ollama's /api/tags, /api/show, /api/version, and /api/embed."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from octavo import __version__
from octavo.errors import InvalidParameterError
from octavo.pooling import vector_size
from octavo.server.http import fields
from octavo.server.http.body import Body
from octavo.server.pooling.pool import (
    cut_vectors,
    encoded_texts,
    pool,
    prompted,
    render_json,
    usage,
)
from octavo.server.pooling.protocol import EMBEDDING_BODY, PoolingRequest

if TYPE_CHECKING:
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState

_NAME: Final = fields.string(least_chars=1)
SHOW_BODY: Final = Body(
    {"model": _NAME, "name": _NAME, "verbose": fields.boolean}, one_of=(("model",), ("name",))
)
EMBED_BODY: Final = Body(
    {
        "model": _NAME,
        "input": EMBEDDING_BODY.fields["input"],
        "truncate": fields.boolean,
        "dimensions": EMBEDDING_BODY.fields["dimensions"],
    },
    required=("model", "input"),
    # They tell how to load a model, and sample.
    ignored=frozenset({"keep_alive", "options"}),
)


def _details(model: ServedModel) -> dict[str, Any]:
    source = model.engine.source
    family = source.model_config.architecture
    return {
        "parent_model": "",
        "format": source.kind,
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": model.engine.config.quantization or "",
    }


async def tags(state: ServerState, exchange: Exchange) -> None:
    """Every name that a model is served under."""
    made = datetime.fromtimestamp(state.created_s, UTC).isoformat().replace("+00:00", "Z")
    models = [
        {
            "name": name,
            "model": name,
            "modified_at": made,
            "size": 0,
            # Of the name: clients tell models apart by it.
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": _details(model),
        }
        for name, model in state.models().items()
    ]
    await exchange.respond_json({"models": models})


async def show(state: ServerState, exchange: Exchange) -> None:
    """A model's shape and abilities."""
    exchange.allow_any_type()
    clean = await exchange.read(SHOW_BODY.clean)
    model = state.model(clean.get("model") or clean["name"])
    shape = model.engine.model_config
    architecture = shape.architecture
    await exchange.respond_json(
        {
            "modelfile": "",
            "parameters": "",
            "template": model.engine.chat_template or "",
            "details": _details(model),
            "model_info": {
                "general.architecture": architecture,
                f"{architecture}.context_length": model.engine.max_model_len,
                f"{architecture}.embedding_length": shape.hidden_size,
            },
            "capabilities": _capabilities(model),
        }
    )


def _capabilities(model: ServedModel) -> list[str]:
    if model.engine.pooling is not None:
        return ["embedding"]
    found = ["completion"]
    if model.has_template and model.chat_format.tool_calls is not None:
        found.append("tools")
    if model.has_template and model.chat_format.reasoning_markers is not None:
        found.append("thinking")
    return found


async def version(state: ServerState, exchange: Exchange) -> None:
    """octavo's version."""
    await exchange.respond_json({"version": __version__})


async def embed(state: ServerState, exchange: Exchange) -> None:
    """One vector a text."""
    exchange.allow_any_type()
    began = time.perf_counter()
    clean = await exchange.read(EMBED_BODY.clean)
    if not all(isinstance(one, str) for one in clean["input"]):
        raise InvalidParameterError("input must be a string or a list of strings", "input")
    model = state.model_for_work(clean["model"])
    engine, info = model.engine, model.pooling("embed")
    size = vector_size(info, clean.get("dimensions"), "dimensions")
    most = engine.max_model_len if clean.get("truncate", True) else None
    inputs = prompted(clean["input"], info.prompts.find(None))
    texts = await encoded_texts(engine, inputs, most, "input")
    request = PoolingRequest(model=clean["model"])
    pooled = await pool(state, exchange, engine, request, texts, "input")

    def body() -> dict[str, Any]:
        return {
            "model": clean["model"],
            "embeddings": cut_vectors(pooled, info, size),
            "total_duration": round((time.perf_counter() - began) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage(texts)["prompt_tokens"],
        }

    await exchange.respond_body(await render_json(body, len(texts) * size))
