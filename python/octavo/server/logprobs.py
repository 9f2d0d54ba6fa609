"""Logprobs in OpenAI's two shapes, from the core's (token id, logprob, rank) lists."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

from octavo.server.token_texts import TokenTexts

Candidates = Sequence[tuple[int, float, int]]

# JSON has no infinity; OpenAI writes this for a token that cannot be.
LEAST_LOGPROB: Final = -9999.0


def _name(texts: TokenTexts, token_id: int, as_id: bool) -> str:
    return f"token_id:{token_id}" if as_id else texts[token_id].text


def chat_logprobs(
    positions: Sequence[Candidates], texts: TokenTexts, num_top: int, as_ids: bool
) -> dict[str, Any]:
    """``{"content": [...]}``; each position's candidates begin with the chosen token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _name(texts, token_id, as_ids),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": texts[token_id].bytes,
        }

    return {
        "content": [
            {
                **entry(*candidates[0][:2]),
                "top_logprobs": [entry(*best[:2]) for best in candidates[1 : 1 + num_top]],
            }
            for candidates in positions
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """Completions' arrays. Keeps the text offset of one sample from chunk to chunk."""

    def __init__(self, texts: TokenTexts, num_top: int, as_ids: bool, offset: int = 0) -> None:
        self._texts = texts
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = offset
        # A character may take several tokens: the offset moves when it is whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, positions: Sequence[Candidates]) -> dict[str, Any]:
        """The next tokens' arrays. The chosen token is among its top ones, beside the best."""
        tokens: list[str] = []
        token_logprobs: list[float] = []
        top_logprobs: list[dict[str, float]] = []
        text_offset: list[int] = []
        for candidates in positions:
            chosen_id, chosen_logprob, _ = candidates[0]
            tokens.append(_name(self._texts, chosen_id, self._as_ids))
            token_logprobs.append(max(chosen_logprob, LEAST_LOGPROB))
            top: dict[str, float] = {}
            for token_id, logprob, _ in (*candidates[1 : 1 + self._num_top], candidates[0]):
                # Two halves of characters may read the same: the likelier one stays.
                top.setdefault(
                    _name(self._texts, token_id, self._as_ids), max(logprob, LEAST_LOGPROB)
                )
            top_logprobs.append(top)
            text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(self._texts[chosen_id].bytes)))
        return {
            "text_offset": text_offset,
            "token_logprobs": token_logprobs,
            "tokens": tokens,
            "top_logprobs": top_logprobs,
        }
