"""Bodies of requests for vectors, scores and classes: each field checked, none ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from octavo.errors import InvalidParameterError
from octavo.pooling import PoolingTask
from octavo.server.http import fields, limits
from octavo.server.http.body import BOOKKEEPING_FIELDS, Body
from octavo.server.pooling.forms import DTYPES, ENCODINGS, ENDIANNESS
from octavo.server.work.template_variables import template_variables

_TOKEN_IDS: Final = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
# Queries and documents may be empty: a text of special tokens alone is one.
_TEXTS: Final = {
    "type": "array",
    "items": {"type": "string"},
    "minItems": 1,
    "maxItems": limits.MAX_EMBEDDING_INPUTS,
}
_DOCUMENT: Final = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
    ]
}


# Cohere's forms of a vector. The binary ones have a bit a number.
EMBEDDING_TYPES: Final = ("float", "base64", "int8", "uint8", "binary", "ubinary")


@dataclass(slots=True, kw_only=True)
class PoolingRequest:
    """Fields of every request to a pooling model."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    priority: int = 0


@dataclass(slots=True, kw_only=True)
class EmbeddingRequest(PoolingRequest):
    """A checked /v1/embeddings request."""

    inputs: list[fields.Prompt]
    encoding_format: str = "float"
    embed_dtype: str = "float32"
    endianness: str = "native"
    dimensions: int | None = None
    add_special_tokens: bool = True
    prompt_name: str | None = None
    prompt: str | None = None


@dataclass(slots=True, kw_only=True)
class PairsRequest(PoolingRequest):
    """Fields of requests about pairs of a query and a document.

    ``max_tokens_per_query``, ``max_tokens_per_doc``: of a text before it is paired, 0: all.
    ``instruction``, ``chat_template_kwargs``: variables of the template that makes one text of two.
    """

    use_activation: bool = True
    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The template's variables; the object's own ``instruction`` counts before the field."""
        named = {} if self.instruction is None else {"instruction": self.instruction}
        return named | self.chat_template_kwargs


@dataclass(slots=True, kw_only=True)
class ScoreRequest(PairsRequest):
    """A checked /v1/score request: as many first texts as second ones.

    ``names``: of the two fields that the texts came in.
    """

    firsts: list[str]
    seconds: list[str]
    names: tuple[str, str]


@dataclass(slots=True, kw_only=True)
class RerankRequest(PairsRequest):
    """A checked /v1/rerank request. ``top_n`` 0: all documents."""

    query: str
    documents: list[str]
    top_n: int = 0
    return_documents: bool = True


@dataclass(slots=True, kw_only=True)
class ClassifyRequest(PoolingRequest):
    """A checked /classify request."""

    inputs: list[fields.Prompt]
    add_special_tokens: bool = True
    use_activation: bool = True


@dataclass(slots=True, kw_only=True)
class EncodeRequest(ClassifyRequest):
    """A checked /pooling request. ``task`` None: the model's own."""

    task: str | None = None
    embedding_mode: str | None = None
    dimensions: int | None = None
    encoding_format: str = "float"
    embed_dtype: str = "float32"
    endianness: str = "native"
    prompt_name: str | None = None
    prompt: str | None = None


@dataclass(slots=True, kw_only=True)
class CohereEmbedRequest(PoolingRequest):
    """A checked /v2/embed request. ``max_tokens`` None: what the model takes."""

    texts: list[str]
    embedding_types: tuple[str, ...] = ("float",)
    output_dimension: int | None = None
    max_tokens: int | None = None
    truncate: str = "END"
    input_type: str | None = None


def _input_list(item: dict[str, Any]) -> dict[str, Any]:
    most = limits.MAX_EMBEDDING_INPUTS
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


@fields.check(
    anyOf=[
        {"type": "string"},
        _input_list({"type": "string"}),
        _TOKEN_IDS,
        _input_list(_TOKEN_IDS),
    ]
)
def _inputs(name: str, value: Any) -> list[fields.Prompt]:
    """str, [str], [int] or [[int]] as a list of texts."""
    return fields.texts_or_ids(name, value, _check_inputs)


def _check_inputs(name: str, value: list[Any]) -> None:
    limits.check_count(name, value, limits.MAX_EMBEDDING_INPUTS, "texts")


@fields.check(anyOf=[{"type": "string"}, _TEXTS])
def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not value:
        raise fields.invalid(name, "a string or a list of strings", value)
    return list(fields.strings(name, value, limits.MAX_EMBEDDING_INPUTS))


@fields.check(**_TEXTS)
def _text_list(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise fields.invalid(name, "a list of strings", value)
    return list(fields.strings(name, value, limits.MAX_EMBEDDING_INPUTS))


@fields.check(type="array", minItems=1, maxItems=16, items={"enum": list(EMBEDDING_TYPES)})
def _embedding_types(name: str, value: Any) -> tuple[str, ...]:
    types = fields.strings(name, value, 16)
    if not types or not set(types) <= set(EMBEDDING_TYPES):
        raise fields.invalid(name, "a list of " + ", ".join(EMBEDDING_TYPES), value)
    return types


@fields.check(**_input_list(_DOCUMENT))
def _documents(name: str, value: Any) -> list[str]:
    """Each a string, or an object that holds nothing but ``text``."""
    if not isinstance(value, list) or not value:
        raise fields.invalid(name, "a list of at least one document", value)
    limits.check_count(name, value, limits.MAX_EMBEDDING_INPUTS, "documents")
    texts = []
    for index, item in enumerate(value):
        text = item["text"] if isinstance(item, dict) and set(item) == {"text"} else item
        if not isinstance(text, str):
            raise fields.invalid(f"{name}[{index}]", "a string or an object with text", item)
        texts.append(text)
    return texts


_COMMON: Final[dict[str, fields.Check]] = {
    "model": fields.string(),
    "truncate_prompt_tokens": fields.truncation,
    "truncation_side": fields.one_of("left", "right"),
    "priority": fields.PRIORITY,
}
EMBEDDING_BODY: Final = Body(
    {
        **_COMMON,
        "input": _inputs,
        "encoding_format": fields.one_of(*ENCODINGS),
        "embed_dtype": fields.one_of(*DTYPES),
        "endianness": fields.one_of(*ENDIANNESS),
        "dimensions": fields.integer(1),
        "add_special_tokens": fields.boolean,
        "prompt_name": fields.string(),
        "prompt": fields.string(),
    },
    required=("input",),
    ignored=BOOKKEEPING_FIELDS,
)
CLASSIFY_BODY: Final = Body(
    {
        **_COMMON,
        "input": _inputs,
        "add_special_tokens": fields.boolean,
        "use_activation": fields.boolean,
    },
    required=("input",),
    ignored=BOOKKEEPING_FIELDS,
)
_PAIRS: Final[dict[str, fields.Check]] = {
    "use_activation": fields.boolean,
    "max_tokens_per_query": fields.integer(0),
    "max_tokens_per_doc": fields.integer(0),
    "instruction": fields.string(),
    "chat_template_kwargs": template_variables,
}
# vLLM's names of the two fields, the older ones first.
SCORE_NAMES: Final = (
    ("text_1", "text_2"),
    ("data_1", "data_2"),
    ("queries", "documents"),
    ("queries", "items"),
)
SCORE_BODY: Final = Body(
    {
        **_COMMON,
        **_PAIRS,
        **{name: _texts for names in SCORE_NAMES for name in names},
    },
    one_of=SCORE_NAMES,
    ignored=BOOKKEEPING_FIELDS,
)
ENCODE_BODY: Final = Body(
    {
        **CLASSIFY_BODY.fields,
        "task": fields.one_of(*get_args(PoolingTask)),
        "embedding_mode": fields.one_of("query", "document"),
        **{
            name: EMBEDDING_BODY.fields[name]
            for name in (
                "encoding_format",
                "embed_dtype",
                "endianness",
                "dimensions",
                "prompt_name",
                "prompt",
            )
        },
    },
    required=("input",),
    ignored=BOOKKEEPING_FIELDS,
)
COHERE_EMBED_BODY: Final = Body(
    {
        "model": fields.string(),
        "priority": fields.PRIORITY,
        "texts": _text_list,
        "embedding_types": _embedding_types,
        "output_dimension": fields.integer(1),
        "max_tokens": fields.integer(1),
        "truncate": fields.one_of("NONE", "START", "END"),
        "input_type": fields.string(),
    },
    required=("texts",),
    refused={"images": (), "inputs": ()},
    ignored=BOOKKEEPING_FIELDS,
)
RERANK_BODY: Final = Body(
    {
        **_COMMON,
        **_PAIRS,
        "query": fields.string(),
        "documents": _documents,
        "top_n": fields.integer(0),
        "return_documents": fields.boolean,
    },
    required=("query", "documents"),
    ignored=BOOKKEEPING_FIELDS,
)


def parse_embedding(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Check a /v1/embeddings body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = EMBEDDING_BODY.clean(body)
    return EmbeddingRequest(inputs=clean.pop("input"), **clean)


def parse_classify(body: Mapping[str, Any]) -> ClassifyRequest:
    """Check a /classify body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = CLASSIFY_BODY.clean(body)
    return ClassifyRequest(inputs=clean.pop("input"), **clean)


def parse_score(body: Mapping[str, Any]) -> ScoreRequest:
    """Check a /v1/score body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = SCORE_BODY.clean(body)
    names = next(names for names in SCORE_NAMES if all(name in clean for name in names))
    firsts, seconds = (clean.pop(name) for name in names)
    if len(firsts) == 1:
        firsts *= len(seconds)
    if len(firsts) != len(seconds):
        first, second = names
        raise InvalidParameterError(
            f"{first} holds {len(firsts)} texts and {second} {len(seconds)}: {first} must hold "
            "one, or as many",
            first,
        )
    return ScoreRequest(firsts=firsts, seconds=seconds, names=names, **clean)


def parse_rerank(body: Mapping[str, Any]) -> RerankRequest:
    """Check a /v1/rerank body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    return RerankRequest(**RERANK_BODY.clean(body))


def parse_encode(body: Mapping[str, Any]) -> EncodeRequest:
    """Check a /pooling body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    clean = ENCODE_BODY.clean(body)
    return EncodeRequest(inputs=clean.pop("input"), **clean)


def parse_cohere_embed(body: Mapping[str, Any]) -> CohereEmbedRequest:
    """Check a /v2/embed body.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    return CohereEmbedRequest(**COHERE_EMBED_BODY.clean(body))
