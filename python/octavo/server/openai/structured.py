"""Fields that constrain a request's text: response_format, structured_outputs, and guided_*."""

from __future__ import annotations

from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError, clip
from octavo.server.http import fields
from octavo.structured_outputs import KINDS, StructuredOutputsParams

# Constraints by field: what the engine calls them.
_GUIDED: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_OPTIONS: Final = frozenset(
    {"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}
)
# Of vLLM's, without a meaning here: there is one backend, and it needs no other to fall back to.
_IGNORED: Final = frozenset({"disable_fallback", "backend", "_backend"})

_SCHEMA: Final = {"type": ["object", "string", "boolean"]}
_TYPES: Final = ("text", "json_object", "json_schema", "structural_tag")


@fields.check(
    type="object",
    required=["type"],
    properties={
        "type": {"enum": list(_TYPES)},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "schema": _SCHEMA,
                "strict": {"type": ["boolean", "null"]},
            },
        },
        "structures": {"type": "array", "items": {"type": "object"}},
        "triggers": {"type": "array", "items": {"type": "string"}},
        "format": {"type": "object"},
    },
)
def _response_format(name: str, value: Any) -> StructuredOutputsParams | None:
    """None asks for nothing. ``strict`` makes no difference: a schema is always enforced."""
    form = fields.json_object(name, value)
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        # Some servers' form, in which a schema stands beside the type.
        if (schema := form.get("schema")) is not None:
            return StructuredOutputsParams(json=schema, param=name)
        return StructuredOutputsParams(json_object=True, param=name)
    if kind == "json_schema":
        inner = form.get("json_schema", form if "schema" in form else None)
        if not isinstance(inner, dict):
            field = f"{name}.json_schema"
            raise InvalidParameterError(f"{field} must be an object that holds schema", field)
        if (schema := inner.get("schema")) is None:
            return StructuredOutputsParams(json_object=True, param=name)
        return StructuredOutputsParams(json=schema, param=name)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=form, param=name)
    raise fields.invalid(f"{name}.type", "one of " + ", ".join(_TYPES), kind)


@fields.check(
    type="object",
    properties={
        "json": _SCHEMA,
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "grammar": {"type": "string"},
        "json_object": {"type": "boolean"},
        "structural_tag": {"type": ["object", "string"]},
        "disable_any_whitespace": {"type": "boolean"},
        "disable_additional_properties": {"type": "boolean"},
        "whitespace_pattern": {"type": "string"},
    },
)
def _structured_outputs(name: str, value: Any) -> StructuredOutputsParams:
    given = fields.json_object(name, value)
    for key in given:
        if key not in _OPTIONS and key not in KINDS and key not in _IGNORED:
            field = f"{name}.{clip(key)}"
            raise UnsupportedParameterError(f"Unrecognized request argument: {field}", field)
    known = {key: one for key, one in given.items() if one is not None and key not in _IGNORED}
    return StructuredOutputsParams(**known)


@fields.check(**_SCHEMA)
def _any_json(name: str, value: Any) -> Any:
    """Any JSON; StructuredOutputsParams checks the rest."""
    return value


FIELDS: Final[dict[str, fields.Check]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _any_json,
    "guided_regex": fields.string(),
    "guided_choice": fields.Check(
        {"type": "array", "items": {"type": "string"}, "minItems": 1}, lambda name, value: value
    ),
    "guided_grammar": fields.string(),
    "guided_whitespace_pattern": fields.string(least_chars=1),
    "guided_decoding_backend": fields.string(),
}


def take_constraint(clean: dict[str, Any]) -> StructuredOutputsParams | None:
    """Move the fields of ``FIELDS`` out of a checked body: the constraint that they make.

    Raises:
        InvalidParameterError: there are several; names the last field.
    """
    clean.pop("guided_decoding_backend", None)
    pattern = clean.pop("guided_whitespace_pattern", None)
    found: dict[str, StructuredOutputsParams] = {}
    for name in ("response_format", "structured_outputs"):
        if (constraint := clean.pop(name, None)) is not None:
            found[name] = constraint
    for name, kind in _GUIDED.items():
        if name in clean:
            options: dict[str, Any] = {kind: clean.pop(name), "whitespace_pattern": pattern}
            found[name] = StructuredOutputsParams(**options, param=name)
    if len(found) > 1:
        first, *_, last = found
        raise InvalidParameterError(f"{last} and {first} cannot both be there", last)
    return next(iter(found.values()), None)
