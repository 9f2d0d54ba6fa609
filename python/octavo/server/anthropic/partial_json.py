"""Partial JSON: as much of an object as a text that was cut inside it holds.

The answer's ``input`` is an object, whatever the model had time to write. The result is that of
Anthropic's client, which reads the fragments of a stream in the same way: values that are complete
stay, the one that was cut is left out.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

# A string, or the quote of one that does not end; a mark; a number or a word.
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\],:]|[^\s"{}\[\],:]+', re.DOTALL)
_CLOSERS: Final = {"{": "}", "[": "]"}


def read_object(text: str) -> dict[str, Any]:
    """The object of a text, or of what there is of one; empty where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _read_cut(text)
    return value if isinstance(value, dict) else {}


def _read_cut(text: str) -> Any:
    """The value up to the last place where it could have ended."""
    stack: list[str] = []
    # The text so far without what is incomplete, its brackets closed.
    end, closing = 0, ""
    before = ""
    for token in _TOKEN.finditer(text):
        word = token.group()
        is_name = before in ("{", ",") and bool(stack) and stack[-1] == "}" and word != "}"
        before = word
        if word in _CLOSERS:
            stack.append(_CLOSERS[word])
        elif word in ("}", "]"):
            if not stack or stack.pop() != word:
                break
        elif is_name or word in (",", ":"):
            continue
        elif not _is_value(word):
            break
        end, closing = token.end(), "".join(reversed(stack))
    try:
        return json.loads(text[:end] + closing)
    except (ValueError, RecursionError):
        return None


def _is_value(word: str) -> bool:
    try:
        json.loads(word)
    except ValueError:
        return False
    return True
