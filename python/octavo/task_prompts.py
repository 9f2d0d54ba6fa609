"""TaskPrompts: texts that an embedder was trained to read before its inputs, one for each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError

# Cohere's kinds of a text, and the names of prompts that stand for them.
_INPUT_TYPES: Final = {
    "search_query": ("query", "web_search_query"),
    "search_document": ("document", "passage", "corpus"),
}


@dataclass(frozen=True, slots=True)
class TaskPrompts:
    """The prompts of sentence-transformers' config_sentence_transformers.json.

    ``default``: the name of the one that a request without a word on prompts gets. ``is_pooled``:
    the prompt's tokens are pooled with those of the text.
    """

    by_name: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    is_pooled: bool = True

    def find(self, name: str | None, text: str | None = None) -> str:
        """The text before each of a request's, as sentence-transformers chooses it.

        Args:
            name: of a prompt; None: the default one, where the model has one.
            text: a prompt of the request's own, which counts before a name.

        Raises:
            InvalidParameterError: the model has no prompt of that name.
            UnsupportedParameterError: its tokens are not to be pooled.
        """
        if text is not None:
            return self._checked(text, "prompt")
        name = self.default if name is None else name
        if name is None:
            return ""
        if name not in self.by_name:
            raise InvalidParameterError(
                f"prompt_name {name!r} is not one of this model's: {self._known()}", "prompt_name"
            )
        return self._checked(self.by_name[name], "prompt_name")

    def find_for(self, input_type: str | None) -> str:
        """The same for one of Cohere's kinds of texts, or a prompt's name.

        Raises:
            InvalidParameterError: the model has no prompt for it.
            UnsupportedParameterError: its tokens are not to be pooled.
        """
        if input_type is None:
            return self.find(None)
        names = (input_type, *_INPUT_TYPES.get(input_type, ()))
        found = next((name for name in names if name in self.by_name), None)
        if found is None:
            raise InvalidParameterError(
                f"input_type {input_type!r} has no prompt among this model's: {self._known()}",
                "input_type",
            )
        return self._checked(self.by_name[found], "input_type")

    def _checked(self, text: str, param: str) -> str:
        if text and not self.is_pooled:
            raise UnsupportedParameterError(
                f"{param} is not supported: this model leaves prompts out of what it pools", param
            )
        return text

    def _known(self) -> str:
        return ", ".join(map(repr, sorted(self.by_name))) or "it has none"
