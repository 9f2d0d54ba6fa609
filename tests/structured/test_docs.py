"""docs/structured_outputs.md holds the keywords and kinds that are supported: it is written here."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from octavo._core import Grammars, Matcher
from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "structured_outputs.md"
BEGIN, END = "<!-- written by tests/structured/test_docs.py -->\n", "<!-- end -->\n"
EOS = 299

# Keyword -> (schema, a text that is valid, one that is not; "" is none to show).
KEYWORDS: dict[str, tuple[Any, str, str]] = {
    "type": ({"type": ["integer", "null"]}, "12", "1.5"),
    "enum": ({"enum": ["a", 1, [2]]}, "[2]", '"b"'),
    "const": ({"const": {"a": None}}, '{"a": null}', "{}"),
    "properties, required": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}},
            "required": ["b"],
            "additionalProperties": False,
        },
        '{"b": true}',
        '{"a": null}',
    ),
    "additionalProperties": (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        '{"x": 1}',
        '{"x": "1"}',
    ),
    "patternProperties": (
        {
            "type": "object",
            "patternProperties": {"^x": {"type": "integer"}},
            "additionalProperties": False,
        },
        '{"x1": 1}',
        '{"y": 1}',
    ),
    "minProperties, maxProperties": (
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": "null"},
        },
        '{"a": null}',
        "{}",
    ),
    "items": ({"type": "array", "items": {"type": "boolean"}}, "[true, false]", "[1]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1]", "[2]"),
    "minItems, maxItems": (
        {"type": "array", "items": {"const": 0}, "minItems": 1, "maxItems": 2},
        "[0]",
        "[]",
    ),
    "minLength, maxLength": ({"type": "string", "minLength": 2, "maxLength": 3}, '"ab"', '"a"'),
    "pattern": ({"type": "string", "pattern": "^[a-c]+$"}, '"abc"', '"d"'),
    "minimum, maximum": ({"type": "integer", "minimum": 3, "maximum": 12}, "12", "13"),
    "exclusiveMinimum, exclusiveMaximum": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "0.5",
        "1",
    ),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, "15", "7"),
    "format: date-time": (
        {"type": "string", "format": "date-time"},
        '"2024-02-29T10:00:00Z"',
        '"2024"',
    ),
    "format: date": ({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-13-01"'),
    "format: time": ({"type": "string", "format": "time"}, '"10:00:00Z"', '"25:00:00Z"'),
    "format: duration": ({"type": "string", "format": "duration"}, '"P1DT2H"', '"1d"'),
    "format: email": ({"type": "string", "format": "email"}, '"a@b.org"', '"a"'),
    "format: hostname": ({"type": "string", "format": "hostname"}, '"b.org"', '"-"'),
    "format: ipv4": ({"type": "string", "format": "ipv4"}, '"10.0.0.1"', '"10.0.0"'),
    "format: ipv6": ({"type": "string", "format": "ipv6"}, '"::1"', '"1"'),
    "format: uuid": (
        {"type": "string", "format": "uuid"},
        '"00000000-0000-0000-0000-00000000000a"',
        '"0"',
    ),
    "format: uri": ({"type": "string", "format": "uri"}, '"http://b.org/x"', '"x y"'),
    "a format that the standard does not have": (
        {"type": "string", "format": "password"},
        '"x"',
        "1",
    ),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 5}]}, "4", "2"),
    "anyOf": ({"anyOf": [{"const": 1}, {"type": "string", "maxLength": 1}]}, '"x"', "2"),
    "oneOf whose options cannot hold at once": (
        {"oneOf": [{"type": "string"}, {"const": 1}]},
        "1",
        "2",
    ),
    "oneOf with a discriminator": (
        {
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "discriminator": {"propertyName": "k"},
            "$defs": {
                name: {
                    "type": "object",
                    "properties": {"k": {"const": name}},
                    "additionalProperties": False,
                }
                for name in "AB"
            },
        },
        '{"k": "A"}',
        '{"k": "C"}',
    ),
    "oneOf otherwise": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "", ""),
    "$ref, $defs, definitions": (
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
        "[[], []]",
        "[1]",
    ),
    "$ref out of the schema": ({"$ref": "http://example.org/schema"}, "", ""),
    "not": ({"not": {"type": "string"}}, "", ""),
    "if, then, else": ({"if": {"type": "string"}, "then": {"minLength": 1}}, "", ""),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "", ""),
    "contains, minContains, maxContains": ({"contains": {"const": 1}}, "", ""),
    "propertyNames": ({"propertyNames": {"maxLength": 3}}, "", ""),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "", ""),
    "dependentSchemas": ({"dependentSchemas": {"a": {"required": ["b"]}}}, "", ""),
    "unevaluatedProperties, unevaluatedItems": ({"unevaluatedProperties": False}, "", ""),
    "$dynamicRef": ({"$dynamicRef": "#x"}, "", ""),
}

# (field, its value's form) -> (kind, text, a text that follows, one that does not)
KINDS: dict[tuple[str, str], tuple[Any, str, str, str]] = {
    ("json", "JSON schema"): ("json", '{"type": "boolean"}', "true", "1"),
    ("json_object", "true"): ("json_object", "", '{"a": [1]}', "[1]"),
    ("regex", "regular expression of the whole text"): (
        "regex",
        "[a-c]+-[0-9]{2}",
        "abc-12",
        "abc-1",
    ),
    ("choice", "list of texts"): ("choice", '["yes", "no"]', "no", "maybe"),
    ("grammar", "Lark"): ("grammar", 'start: "(" start* ")"', "(()())", "(()"),
    ("grammar", "GBNF"): ("grammar", 'root ::= "(" root* ")"', "(()())", "(()"),
    ("structural_tag", "structures and triggers"): (
        "structural_tag",
        '{"structures": [{"begin": "<t>", "schema": {"type": "null"}, "end": "</t>"}], "triggers": ["<t"]}',
        "so <t>null</t> it is",
        "so <t>1</t>",
    ),
    ("structural_tag", "format: a tree of formats"): (
        "structural_tag",
        '{"type": "structural_tag", "format": {"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "regex", "pattern": "[0-9]"}]}}',
        "7",
        "y",
    ),
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(make_dummy_tokenizer(300), 300, [EOS])


def follows(grammars: Grammars, kind: Any, text: str, output: str) -> bool:
    """True if an output, byte by byte, is a whole text of the grammar."""
    matcher = Matcher(grammars.compile(kind, text), 300)
    is_complete = False
    for byte in output.encode():
        if is_complete:
            return False
        try:
            is_complete = matcher.accept(byte)
        except ValueError:
            return False
    return is_complete or matcher.is_accepting()


def tables(grammars: Grammars) -> str:
    lines = ["| field | value | follows | does not |", "|---|---|---|---|"]
    for (field, form), (kind, text, good, bad) in KINDS.items():
        assert follows(grammars, kind, text, good), (field, form)
        assert not follows(grammars, kind, text, bad), (field, form)
        lines.append(f"| `{field}` | {form} | `{good}` | `{bad}` |")
    lines += [
        "",
        "| keyword of a JSON schema | enforced | valid | not valid |",
        "|---|---|---|---|",
    ]
    for name, (schema, good, bad) in KEYWORDS.items():
        text = json.dumps(schema)
        if not good:
            with pytest.raises(ValueError, match="supported") as refusal:
                grammars.compile("json", text)
            why = re.sub("^at #: ", "", str(refusal.value))
            lines.append(f"| {name} | no: {why} | | |")
            continue
        assert follows(grammars, "json", text, good), name
        assert not follows(grammars, "json", text, bad), name
        lines.append(f"| {name} | yes | `{good}` | `{bad}` |")
    return "\n".join(lines) + "\n"


def test_the_tables_are_what_the_grammars_do(grammars: Grammars) -> None:
    written = tables(grammars)
    head, _, rest = DOCS.read_text().partition(BEGIN)
    listed, _, tail = rest.partition(END)
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        DOCS.write_text(head + BEGIN + written + END + tail)
        listed = written
    assert listed == written, "run this test with OCTAVO_WRITE_DOCS=1"
