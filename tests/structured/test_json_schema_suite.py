"""The public JSON-Schema-Test-Suite: what a schema forbids cannot be written.

Read at test time from the folder of one draft in OCTAVO_JSON_SCHEMA_SUITE. A schema that octavo refuses
is left out: its keywords are in docs/structured_outputs.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from octavo._core import Grammar, Grammars, Matcher
from octavo.checkpoints.dummy_tokenizer import make_dummy_tokenizer

FOLDER = os.environ.get("OCTAVO_JSON_SCHEMA_SUITE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="OCTAVO_JSON_SCHEMA_SUITE is not set"),
]

# Bytes, and an end.
VOCAB_SIZE = 257
EOS = 256
MAX_TOKENS = 400
# Fewer would mean that nothing is compiled any more.
LEAST_SCHEMAS = 150


def schemas() -> list[tuple[str, Any, list[Any]]]:
    """(name, schema, instances that are not valid) of all cases."""
    found = []
    for file in sorted(Path(FOLDER or "").glob("*.json")):
        for case in json.loads(file.read_text()):
            invalid = [one["data"] for one in case["tests"] if not one["valid"]]
            found.append((f"{file.stem}: {case['description']}", case["schema"], invalid))
    return found


def takes(grammar: Grammar, text: str) -> bool:
    """True if the text as a whole may be written."""
    matcher = Matcher(grammar, VOCAB_SIZE)
    for byte in text.encode():
        if not matcher.mask()[byte // 8] >> (byte % 8) & 1:
            return False
        if matcher.accept(byte):
            return byte == text.encode()[-1]
    return matcher.is_accepting()


def written(grammar: Grammar, seed: int) -> str | None:
    """A text at random; None: it has not come to an end."""
    rng = random.Random(seed)
    matcher, text = Matcher(grammar, VOCAB_SIZE), bytearray()
    for _ in range(MAX_TOKENS):
        mask = int.from_bytes(matcher.mask(), "little")
        allowed = [id for id in range(VOCAB_SIZE) if mask >> id & 1]
        # An end or a closing quote wherever one may be: else few texts come to theirs.
        ends = [id for id in allowed if id in (EOS, *b'"]}')]
        token = rng.choice(ends if ends and rng.random() < 0.5 else allowed)
        if token == EOS:
            return text.decode()
        text.append(token)
        if matcher.accept(token):
            return text.decode()
    return None


def test_what_the_suite_forbids_cannot_be_written() -> None:
    grammars = Grammars(make_dummy_tokenizer(VOCAB_SIZE), VOCAB_SIZE, (EOS,))
    num_compiled, wrong = 0, []
    for name, schema, invalid in schemas():
        try:
            grammar = grammars.compile("json", json.dumps(schema))
        except ValueError:
            continue
        num_compiled += 1
        wrong += [
            (name, instance)
            for instance in invalid
            if takes(grammar, json.dumps(instance, ensure_ascii=False))
        ]
        validator = jsonschema.Draft202012Validator(schema)
        for seed in range(3):
            text = written(grammar, seed)
            # Python's own expressions lack some of the standard's: there is nobody to ask.
            with contextlib.suppress(re.error):
                if text is not None and not validator.is_valid(json.loads(text)):
                    wrong.append((name, text))
    assert num_compiled >= LEAST_SCHEMAS
    assert not wrong, "\n".join(f"{name}: {what!r}" for name, what in wrong)
