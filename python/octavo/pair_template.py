"""PairTemplate: a query and a document as the one text that a reranker was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo.pooling import EncodedText, encode_text
from octavo.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo._core import Tokenizer


class PairTemplate:
    """A chat template with two messages, of the roles "query" and "document", as vLLM has them.

    Args:
        source: the Jinja text.
        special_tokens: variables such as ``bos_token`` -> its text.

    Raises:
        ValueError: the source is not a template; one line with the line number.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = ChatTemplate(source, special_tokens)

    def encode(
        self,
        tokenizer: Tokenizer,
        query: str,
        document: str,
        most: int | None,
        variables: Mapping[str, Any],
    ) -> EncodedText:
        """A pair as the model reads it. Its end is cut off where it has more than ``most`` tokens.

        Args:
            variables: of the template, beside the messages.

        Raises:
            BadRequestError: the template fails on the texts.
            InvalidParameterError: the special tokens alone are more.
        """
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        text = self._template.render(messages, add_generation_prompt=False, **variables)
        return EncodedText(encode_text(tokenizer, text, most))
