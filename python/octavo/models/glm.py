"""GlmForCausalLM, GLM-4-9B and GLM-Edge: Llama with half of a head rotated, by neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from octavo.models.glm4 import Glm4ForCausalLM
from octavo.models.llama import DecoderLayer, LlamaDecoderLayer


class GlmForCausalLM(Glm4ForCausalLM):
    """See LlamaForCausalLM."""

    layer_class: ClassVar[Callable[..., DecoderLayer]] = LlamaDecoderLayer
