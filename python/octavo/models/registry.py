"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.layers.context import AttentionContext
from octavo.layers.ops import Ops
from octavo.models.config import ModelConfig
from octavo.models.errors import ModelLoadError
from octavo.models.llama import LlamaForCausalLM
from octavo.models.weights import Weights


class CausalLM(Protocol):
    """What the runner asks of a model."""

    config: ModelConfig

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None: ...

    def __call__(self, input_ids: Tensor, ctx: AttentionContext) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


class CausalLMFactory(Protocol):
    """A model class: called with the config and where its weights come from."""

    def __call__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        *,
        max_model_len: int,
        device: torch.device,
    ) -> CausalLM: ...


ARCHITECTURES: dict[str, CausalLMFactory] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
}


class ModelRegistry:
    """What can be served."""

    @staticmethod
    def get_supported_archs() -> list[str]:
        """Architectures as config.json spells them, sorted."""
        return sorted(ARCHITECTURES)


def model_class(architecture: str) -> CausalLMFactory:
    """The class for an architecture.

    Raises:
        ModelLoadError: nobody runs it; the message lists what is run.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ModelRegistry.get_supported_archs())
        raise ModelLoadError(f"architecture {architecture!r} is not supported; known: {known}")
    return ARCHITECTURES[architecture]
