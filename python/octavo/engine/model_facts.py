"""ModelFacts: what programs ask of a loaded model, under the names of vLLM's ModelConfig."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.engine_loop import EngineLoop
    from octavo.models.config import ModelConfig


class ModelFacts:
    """A loaded model's names, shape and limits. Read only."""

    def __init__(self, loop: EngineLoop) -> None:
        self._config = loop.config
        self._source = loop.source
        self._shape: ModelConfig = loop.source.model_config
        self._pooling = loop.runner.pooling
        self.max_model_len: int = loop.limits.max_model_len
        self.max_logprobs: int = loop.config.max_logprobs

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return self._source.name

    @property
    def tokenizer(self) -> str:
        """The tokenizer as it was asked for."""
        return self._config.tokenizer or self._source.name

    @property
    def served_model_name(self) -> str:
        """The first of its names in the API."""
        return next(iter(self._config.served_model_name), self._source.name)

    @property
    def dtype(self) -> str:
        """The type that was asked for."""
        return self._config.dtype

    @property
    def architecture(self) -> str:
        """The model's class in its config."""
        return self._shape.architecture

    @property
    def runner_type(self) -> str:
        """ "generate", or "pooling" for a model that gives vectors, scores or classes."""
        return "generate" if self._pooling is None else "pooling"

    @property
    def embedding_size(self) -> int:
        """The size of a pooling model's vectors, of any other's hidden states."""
        return self._shape.hidden_size if self._pooling is None else self._pooling.size

    def get_vocab_size(self) -> int:
        """The model's number of token ids."""
        return self._shape.vocab_size

    def get_hidden_size(self) -> int:
        """The size of a token's hidden state."""
        return self._shape.hidden_size

    @property
    def hf_config(self) -> Any:
        """config.json as attributes.

        Raises:
            AttributeError: the model is a GGUF file, which has none.
        """
        if self._source.gguf is not None:
            raise AttributeError("a GGUF file has no config.json")
        values = dict(self._source.hf_config)
        if isinstance(labels := values.get("id2label"), dict):
            # JSON's keys are strings; transformers has them as numbers.
            values["id2label"] = {int(key): label for key, label in labels.items()}
        return SimpleNamespace(**values)
