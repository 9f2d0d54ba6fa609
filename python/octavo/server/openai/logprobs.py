"""Logprobs in OpenAI's two shapes, from the core's (token id, logprob, rank) lists."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

from octavo.prompt_logprobs import PromptLogprobs
from octavo.server.work.token_texts import TokenTexts

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


def prompt_logprobs(
    scores: PromptLogprobs, texts: TokenTexts, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: per prompt token an object of token id -> logprob, rank and text; the first
    token has null."""
    positions = scores.positions(num_top)
    entries = (
        {
            str(token_id): {
                "logprob": max(logprob, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": texts[token_id].text,
            }
            # The prompt's own token comes first, and may come again among the best.
            for token_id, logprob, rank in reversed(candidates)
        }
        for candidates in positions
    )
    return [None, *entries]


class CompletionLogprobs:
    """Completions' arrays. Keeps the text offset of one sample from chunk to chunk.

    Args:
        texts: of the tokens.
        num_top: alternatives per token.
        as_ids: whether tokens are written as ``token_id:N``.
        skips_special: whether special tokens have no part in the text.
        echo_len: length of the echoed prompt, where the first token that ``push`` takes begins.
    """

    def __init__(
        self,
        texts: TokenTexts,
        num_top: int,
        as_ids: bool,
        skips_special: bool = True,
        echo_len: int = 0,
    ) -> None:
        self._texts = texts
        self._num_top = num_top
        self._as_ids = as_ids
        self._skips_special = skips_special
        self._echo_len = echo_len
        self._offset = echo_len
        # A character may take several tokens: the offset moves when it is whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(self, token_ids: Sequence[int], scores: PromptLogprobs) -> dict[str, Any]:
        """The echoed prompt's arrays. Nothing precedes its first token: null."""
        writer = CompletionLogprobs(self._texts, self._num_top, self._as_ids, self._skips_special)
        # Candidates in the shape of the others, with a value that is not shown.
        arrays = writer.push([[(token_ids[0], 0.0, 1)], *scores.positions(self._num_top)])
        arrays["token_logprobs"][0] = arrays["top_logprobs"][0] = None
        # A text of the client's own holds none of the special tokens put around it.
        arrays["text_offset"] = [min(at, self._echo_len) for at in arrays["text_offset"]]
        return arrays

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
            chosen = self._texts[chosen_id]
            if not (chosen.is_special and self._skips_special):
                self._offset += len(self._decoder.decode(bytes(chosen.bytes)))
        return {
            "text_offset": text_offset,
            "token_logprobs": token_logprobs,
            "tokens": tokens,
            "top_logprobs": top_logprobs,
        }
