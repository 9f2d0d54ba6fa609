"""Logprobs in OpenAI's two shapes, from the core's (token id, logprob, rank) lists."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final

from octavo.prompt_logprobs import PromptLogprobs
from octavo.server.work.token_texts import TokenText, TokenTexts

Candidates = Sequence[tuple[int, float, int]]

# JSON has no infinity; OpenAI writes this for a token that cannot be.
LEAST_LOGPROB: Final = -9999.0


def _name(texts: TokenTexts, token_id: int, as_id: bool) -> str:
    return f"token_id:{token_id}" if as_id else texts[token_id].text


def chat_logprobs(
    positions: Sequence[Candidates],
    texts: TokenTexts,
    num_top: int,
    as_ids: bool,
    names_tokens: bool = False,
) -> dict[str, Any]:
    """``{"content": [...]}``; each position's candidates begin with the chosen token.

    ``names_tokens``: the others are those that the request names, all of which are reported.
    """

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": _name(texts, token_id, as_ids),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": texts[token_id].bytes,
        }

    def top(candidates: Candidates) -> list[dict[str, Any]]:
        if names_tokens:
            # The chosen one belongs to them, as in vLLM, and may be named, too.
            return [entry(*one) for one in {one[0]: one[1] for one in candidates}.items()]
        return [entry(*one[:2]) for one in candidates[1 : 1 + num_top]]

    return {
        "content": [
            {
                **entry(*candidates[0][:2]),
                "top_logprobs": top(candidates),
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
    entries: list[dict[str, Any] | None] = [None]
    for candidates in positions:
        row: dict[str, Any] = {}
        for token_id, logprob, rank in candidates:
            # The prompt's own token comes first, and may come again among the best.
            if str(token_id) not in row:
                row[str(token_id)] = {
                    "logprob": max(logprob, LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": texts[token_id].text,
                }
        entries.append(row)
    return entries


class CompletionLogprobs:
    """Completions' arrays. Keeps the text offset of one sample from chunk to chunk.

    Args:
        texts: of the tokens.
        num_top: alternatives per token.
        as_ids: whether tokens are written as ``token_id:N``.
        skips_special: whether special tokens have no part in the text.
        echo: the echoed prompt, behind which the first token that ``push`` takes begins.
        num_named: tokens that the request names, which stand in for alternatives of the answer's.
    """

    def __init__(
        self,
        texts: TokenTexts,
        num_top: int,
        as_ids: bool,
        skips_special: bool = True,
        echo: str = "",
        num_named: int = 0,
    ) -> None:
        self._texts = texts
        self._num_top = num_top
        self._num_shown = 1 + (num_named or num_top)
        self._as_ids = as_ids
        self._skips_special = skips_special
        self._echo = echo
        self._offset = len(echo)
        # A character may take several tokens: the offset moves when it is whole.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(self, token_ids: Sequence[int], scores: PromptLogprobs) -> dict[str, Any]:
        """The echoed prompt's arrays. Nothing precedes its first token: null."""
        writer = CompletionLogprobs(self._texts, self._num_top, self._as_ids, self._skips_special)
        # Candidates in the shape of the others, with a value that is not shown.
        arrays = writer.push([[(token_ids[0], 0.0, 1)], *scores.positions(self._num_top)])
        arrays["token_logprobs"][0] = arrays["top_logprobs"][0] = None
        arrays["text_offset"] = echo_offsets(
            self._echo, [self._texts[token_id] for token_id in token_ids]
        )
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
            # Clients take the first for the chosen one, which may come again among the best.
            top: dict[str, float] = {}
            for token_id, logprob, _ in candidates[: self._num_shown]:
                name = _name(self._texts, token_id, self._as_ids)
                # Two halves of characters may read the same: the likelier one stays.
                top[name] = max(logprob, top.get(name, LEAST_LOGPROB))
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


def echo_offsets(text: str, tokens: Sequence[TokenText]) -> list[int]:
    """The position in ``text`` of each token of the prompt it echoes.

    A special token that the text spells has its place there; one that the tokenizer put around the
    text takes up none. Where the tokenizer changed the text (case, Unicode forms), positions count
    the tokens' own characters.
    """
    offsets: list[int] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = 0
    for index, token in enumerate(tokens):
        if token.is_special:
            if _is_put_before(text, at, tokens, index):
                offsets.append(at)
                continue
            piece = token.text
        else:
            piece = decoder.decode(bytes(token.bytes))
        at, end = _place(text, at, piece)
        offsets.append(at)
        at = end
    return offsets


def _is_put_before(text: str, at: int, tokens: Sequence[TokenText], index: int) -> bool:
    """True if a special token is none of the text's: there are more of it than the text spells."""
    token = tokens[index]
    num_tokens = 1
    while index + num_tokens < len(tokens) and tokens[index + num_tokens] == token:
        num_tokens += 1
    place = _skip_blanks(text, at)
    for _ in range(num_tokens):
        if not token.text or not text.startswith(token.text, place):
            return True
        place = _skip_blanks(text, place + len(token.text))
    return False


def _place(text: str, at: int, piece: str) -> tuple[int, int]:
    """The beginning and end of a token's text, ``at`` being the end of the one before it."""
    if text.startswith(piece, at):
        return at, at + len(piece)
    # A space that the tokenizer put before the first word.
    if piece.startswith(" ") and text.startswith(piece[1:], at):
        return at, at + len(piece) - 1
    # A special token may have taken in the blanks around it.
    start = _skip_blanks(text, at)
    if text.startswith(piece, start):
        return start, start + len(piece)
    return at, min(at + len(piece), len(text))


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
