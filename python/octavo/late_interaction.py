"""Late interaction: texts as a vector a token, and the score of two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from octavo.errors import InvalidParameterError
from octavo.pooling import EncodedText, PoolingInfo, encode_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo._core import Tokenizer
    from octavo.pooling import Pooled
    from octavo.text_form import TextForm

    # A text, and its ``embedding_mode``.
    Side = tuple[str | None, str]


def form_of(info: PoolingInfo, mode: str | None) -> TextForm | None:
    """The form that ``embedding_mode`` names; None: texts as they are.

    Raises:
        InvalidParameterError: the model has no forms, or none of that name.
    """
    if mode is None:
        return None
    if mode not in info.forms:
        known = " or ".join(map(repr, info.forms)) or "absent: this model has no kinds of texts"
        raise InvalidParameterError(
            f"embedding_mode must be {known}, not {mode!r}", "embedding_mode"
        )
    return info.forms[mode]


def encode_form(
    tokenizer: Tokenizer, text: str, form: TextForm, most: int | None, side: str | None = None
) -> EncodedText:
    """A text's tokens in a form.

    Args:
        most: tokens, where that is less than the form's own limit.
        side: see ``encode_text``.

    Raises:
        InvalidParameterError: the special tokens alone are more.
    """
    room = form.max_len if most is None else min(form.max_len, most)
    prefix = [] if form.prefix is None else [form.prefix]
    token_ids = encode_text(tokenizer, text, room - len(prefix), side=side)
    token_ids[1:1] = prefix
    num_read = len(token_ids)
    if form.filler is not None:
        token_ids += [form.filler] * (room - num_read)
    hides = not form.attends and len(token_ids) > num_read
    kept = ~np.isin(token_ids, list(form.skipped)) if form.skipped else None
    return EncodedText(token_ids, num_read if hides else None, kept)


def max_sim(query: Pooled, document: Pooled) -> float:
    """The sum over a query's vectors [Q, D] of the largest product with one of a document's [T, D].

    0 for a document of which nothing is left.
    """
    return float((query @ document.T).max(axis=1).sum()) if len(document) else 0.0


def scored_pairs(
    info: PoolingInfo, firsts: Sequence[str], seconds: Sequence[str]
) -> list[tuple[Side, Side]]:
    """Keys into ``scored_texts`` of the texts that are compared.

    Both texts of a pair are read alike, but for a late-interaction model: its first one is a query,
    its second a document.
    """
    modes = ("query", "document") if info.forms else (None, None)
    return [
        ((modes[0], first), (modes[1], second))
        for first, second in zip(firsts, seconds, strict=True)
    ]


def scored_texts(
    tokenizer: Tokenizer,
    info: PoolingInfo,
    firsts: Sequence[str],
    seconds: Sequence[str],
    most: int | None,
    side: str | None = None,
) -> dict[Side, EncodedText]:
    """Each text of ``scored_pairs`` once, after the model's default prompt, in its form.

    Args:
        most, side: see ``encode_text``.

    Raises:
        InvalidParameterError: the special tokens alone are more.
    """
    prompt = info.prompts.find(None)

    def encode(mode: str | None, text: str) -> EncodedText:
        form = form_of(info, mode)
        if form is None:
            return EncodedText(encode_text(tokenizer, prompt + text, most, side=side))
        return encode_form(tokenizer, prompt + text, form, most, side)

    sides = (each for pair in scored_pairs(info, firsts, seconds) for each in pair)
    return {each: encode(*each) for each in dict.fromkeys(sides)}
