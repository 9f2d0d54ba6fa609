"""TokenTexts: texts of single tokens, for logprobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from octavo._core import Tokenizer

# 20 alternatives a token come from a small part of the vocabulary: nearly all are hits.
MAX_CACHED = 65536


class TokenText(NamedTuple):
    """A token's text and the bytes it adds. Half a character's text is U+FFFD.

    ``is_special``: such as the end of a text, which is left out where special tokens are skipped.
    """

    text: str
    bytes: list[int]
    is_special: bool


class TokenTexts:
    """Texts by token id, cached."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        entry = self._cache.get(token_id)
        if entry is None:
            raw = self._tokenizer.token_bytes(token_id)
            shown, hidden = (self._tokenizer.decode([token_id], skip) for skip in (False, True))
            entry = TokenText(raw.decode("utf-8", "replace"), list(raw), shown != hidden)
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[token_id] = entry
        return entry
