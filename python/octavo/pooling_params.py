"""PoolingParams: a request's settings for vectors, scores and classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from octavo.errors import InvalidParameterError


@dataclass(slots=True)
class PoolingParams:
    """Settings of one request, with vLLM's names and meanings.

    ``truncate_prompt_tokens``: cut a text to so many tokens, -1 is the model's limit; None refuses
    what is longer. ``dimensions``: the first so many numbers of a vector, scaled to length 1 where
    the model's are; for models trained for it. ``use_activation``: False leaves a classifier's
    logits as they are. ``task``: must be the model's own. ``embedding_mode``: "query" or
    "document", the form of a text for a model of late interaction; None: the text as it is.

    Raises:
        InvalidParameterError: from construction, naming the field.
    """

    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    task: str | None = None
    embedding_mode: str | None = None

    def __post_init__(self) -> None:
        for name in ("truncate_prompt_tokens", "dimensions"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidParameterError(f"{name} must be an integer, not {value!r}", name)
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidParameterError(
                f"dimensions must be positive, not {self.dimensions}", "dimensions"
            )
        if self.use_activation not in (None, True, False):
            raise InvalidParameterError("use_activation must be true or false", "use_activation")
        if self.embedding_mode not in (None, "query", "document"):
            raise InvalidParameterError(
                "embedding_mode must be query or document", "embedding_mode"
            )

    def clone(self) -> PoolingParams:
        """A checked copy."""
        return dataclasses.replace(self)
