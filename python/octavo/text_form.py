"""TextForm: the tokens that a late-interaction model makes of a query, or of a document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextForm:
    """A form of texts, as ColBERT (arXiv 2004.12832) has two of them.

    ``prefix``: a token after a text's first; None: none. ``max_len``: tokens, a longer text is cut.
    ``filler``: the token that fills a shorter text up to ``max_len``, whose vectors count; None:
    texts are as long as they are. ``attends``: other tokens attend to the fillers. ``skipped``:
    tokens whose vectors are left out of the answer.
    """

    max_len: int
    prefix: int | None = None
    filler: int | None = None
    attends: bool = False
    skipped: frozenset[int] = frozenset()
