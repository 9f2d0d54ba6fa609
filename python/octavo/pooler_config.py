"""PoolerConfig: how a model's states become its outputs, in place of what its files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

# vLLM's names of poolings -> octavo's.
_MODES: Final = {"CLS": "cls", "LAST": "last", "MEAN": "mean"}
_TASKS: Final = ("embed", "token_embed", "classify", "token_classify", "score")


@dataclass(slots=True)
class PoolerConfig:
    """Settings of a pooling model, with vLLM's names; None is the model's own.

    Args:
        task: "token_embed" and "token_classify" answer with an output for each token, where the
            model was made for one a text. Any other must be what the model does.
        pooling_type: "CLS", "LAST" or "MEAN": the token that stands for an embedder's text, or the
            mean of all; "ALL" is an output for each token.
        seq_pooling_type, tok_pooling_type: the same, for the two kinds of outputs.

    Raises:
        ValueError: another value; it names the field.
    """

    task: str | None = None
    pooling_type: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None

    def __post_init__(self) -> None:
        kinds = (*_MODES, "ALL")
        for name, known in (
            ("task", _TASKS),
            ("pooling_type", kinds),
            ("seq_pooling_type", tuple(_MODES)),
            ("tok_pooling_type", ("ALL",)),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(
                    f"pooler_config.{name} must be one of {', '.join(known)}, not {value!r}"
                )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PoolerConfig:
        """From a mapping, as a flag's JSON has it.

        Raises:
            ValueError: a name that is not known, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known and value not in (None, False):
                raise ValueError(f"pooler_config.{name} is not one of {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if name in known})

    def settings(self) -> dict[str, str]:
        """The values that are not the model's own, as ``of`` takes them."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value is not None}

    @property
    def mode(self) -> str | None:
        """The pooling of an embedder, in octavo's word; None is the model's own."""
        if self.is_per_token:
            return "token"
        return _MODES.get(str(self.seq_pooling_type or self.pooling_type))

    @property
    def is_per_token(self) -> bool:
        """True where outputs of single tokens are asked for."""
        if self.task is not None:
            return self.task.startswith("token_")
        return "ALL" in (self.pooling_type, self.tok_pooling_type)
