"""Random JSON schemas whose texts are short, whatever a model wants to say."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("a", "name", "count", "日本", 'a "quoted" name', "x/y~z")


def random_schema(seed: int) -> dict[str, Any]:
    """One schema, an object at its root; the same for the same seed."""
    rng = random.Random(seed)
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        schema["$defs"] = {"leaf": _leaf(rng), "pair": _object(rng, 1)}
        schema["properties"]["link"] = {"$ref": f"#/$defs/{rng.choice(('leaf', 'pair'))}"}
        schema["required"].append("link")
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 or rng.random() < 0.4:
        return _leaf(rng)
    return rng.choice((_object, _array, _union))(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 3))
    properties = {name: _any(rng, depth) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    # Without it any property may come, and its name may be of any length.
    schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }
    if rng.random() < 0.3:
        schema["prefixItems"] = [_any(rng, depth)]
    schema["items"] = _any(rng, depth)
    return schema


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"anyOf": [_any(rng, depth), _leaf(rng)]}
    if rng.random() < 0.5:
        options: list[dict[str, Any]] = [{"type": "null"}, {"type": "boolean"}, _string(rng)]
        return {"oneOf": rng.sample(options, 2)}
    tag = {"type": "object", "required": ["kind"], "additionalProperties": False}
    tags = [tag | {"properties": {"kind": {"const": kind}, "v": _leaf(rng)}} for kind in "ab"]
    return {"oneOf": tags}


def _leaf(rng: random.Random) -> dict[str, Any]:
    return rng.choice((_string, _number, _integer, _choice, _plain, _formatted))(rng)


def _string(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {
            "type": "string",
            "pattern": rng.choice((r"^[A-Z]{2}\d{3}$", r"^(ab|cd)+$", r"^x?y{2,3}$")),
        }
    least = rng.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 5)}


def _integer(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(-50, 50)
    schema: dict[str, Any] = {
        "type": "integer",
        "minimum": least,
        "maximum": least + rng.randint(5, 500),
    }
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice((2, 5))
    return schema


def _number(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        (
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "number", "minimum": -3.5, "maximum": 2},
            {"type": ["integer", "null"], "minimum": 1, "maximum": 9},
        )
    )


def _choice(rng: random.Random) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "grün", 1, None, True, "a\nb", 2.5, [1, "x"], {"k": 0}], 3)}


def _plain(rng: random.Random) -> dict[str, Any]:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"const": [0]}))


def _formatted(rng: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))}
