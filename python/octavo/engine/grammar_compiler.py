"""GrammarCompiler: what a request's text is to follow, from its sampling parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo._core import Grammars
from octavo.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from octavo._core import Grammar, Tokenizer
    from octavo.sampling_params import SamplingParams
    from octavo.structured_outputs import StructuredOutputsParams


class GrammarCompiler:
    """The grammars of one model, kept by use. For any thread.

    ``tokenizer``: None where the model generates no text. ``defaults``: of
    ``disable_any_whitespace`` and ``disable_additional_properties``, for requests that have none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        defaults: Mapping[str, Any],
    ) -> None:
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            self._grammars = Grammars(tokenizer, vocab_size, eos_token_ids)
        self._defaults = defaults

    def find(self, params: SamplingParams) -> Grammar | None:
        """The compiled grammar of a request, if it is kept from an earlier one."""
        wanted = params.structured_outputs
        if wanted is None or self._grammars is None:
            return None
        return self._grammars.find(wanted.kind, wanted.text, **self._options(wanted))

    def compile(self, params: SamplingParams) -> Grammar | None:
        """Compile what a request's text is to follow; blocks without the GIL. None: nothing.

        Raises:
            InvalidParameterError: it cannot be followed; names the request's field.
        """
        wanted = params.structured_outputs
        if wanted is None:
            return None
        name = wanted.param or f"structured_outputs.{wanted.kind}"
        if self._grammars is None:
            raise InvalidParameterError(f"{name} needs a model that generates text", name)
        try:
            return self._grammars.compile(wanted.kind, wanted.text, **self._options(wanted))
        except ValueError as error:
            raise InvalidParameterError(f"{name} cannot be used: {error}", name) from None

    def _options(self, wanted: StructuredOutputsParams) -> dict[str, Any]:
        names = ("disable_any_whitespace", "disable_additional_properties")
        options: dict[str, Any] = {
            name: getattr(wanted, name) or bool(self._defaults.get(name)) for name in names
        }
        options["whitespace_pattern"] = wanted.whitespace_pattern
        return options
