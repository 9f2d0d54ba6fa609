"""Prompts as dicts, under vLLM's names: TextPrompt, TokensPrompt, and PromptType of all forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A text. Prefixes are shared only among prompts of one ``cache_salt``."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """Token ids; ``prompt``, their text, is for the output alone."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt
