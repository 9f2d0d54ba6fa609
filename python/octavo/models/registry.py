"""Architectures and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from octavo.checkpoints.weights import Weights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.models.bamba import BambaForCausalLM
from octavo.models.bert import ENCODERS, read_encoder_config
from octavo.models.bloom import BloomForCausalLM
from octavo.models.cohere2 import Cohere2ForCausalLM
from octavo.models.colbert import COLBERT_ARCHITECTURES, colbert_trunk, is_colbert
from octavo.models.config import ModelConfig
from octavo.models.deepseek_v2 import DeepseekV2ForCausalLM
from octavo.models.deepseek_v3 import DeepseekV3ForCausalLM
from octavo.models.ernie4_5 import Ernie4_5ForCausalLM
from octavo.models.ernie4_5_moe import Ernie4_5_MoeForCausalLM
from octavo.models.falcon import FalconForCausalLM
from octavo.models.falcon_h1 import FalconH1ForCausalLM
from octavo.models.foreign_encoder import FOREIGN_ENCODERS, read_foreign_encoder
from octavo.models.gemma import GemmaForCausalLM
from octavo.models.gemma2 import Gemma2ForCausalLM
from octavo.models.gemma3 import Gemma3ForCausalLM
from octavo.models.gemma3n import Gemma3nForCausalLM
from octavo.models.gemma4 import Gemma4ForCausalLM, Gemma4UnifiedForCausalLM
from octavo.models.glm import GlmForCausalLM
from octavo.models.glm4 import Glm4ForCausalLM
from octavo.models.glm4_moe import Glm4MoeForCausalLM
from octavo.models.glm4_moe_lite import Glm4MoeLiteForCausalLM
from octavo.models.gpt_neo import GPTNeoForCausalLM
from octavo.models.gpt_oss import GptOssForCausalLM
from octavo.models.granite import GraniteForCausalLM
from octavo.models.granite_hybrid import GraniteMoeHybridForCausalLM
from octavo.models.granite_moe import GraniteMoeForCausalLM
from octavo.models.hf_config import HfConfig, architecture_of
from octavo.models.hunyuan_dense import HunYuanDenseV1ForCausalLM
from octavo.models.hunyuan_moe import HunYuanMoEV1ForCausalLM
from octavo.models.jamba import JambaForCausalLM
from octavo.models.kimi_linear import KimiLinearForCausalLM
from octavo.models.lfm2 import Lfm2ForCausalLM
from octavo.models.lfm2_moe import Lfm2MoeForCausalLM
from octavo.models.lfm3 import Lfm3ForCausalLM
from octavo.models.llama import LlamaForCausalLM
from octavo.models.llama4 import Llama4ForCausalLM
from octavo.models.mamba1 import FalconMambaForCausalLM, MambaForCausalLM
from octavo.models.mamba2 import Mamba2ForCausalLM
from octavo.models.mimo_v2_flash import MiMoV2FlashForCausalLM
from octavo.models.minimax import MiniMaxForCausalLM
from octavo.models.minimax_m2 import MiniMaxM2ForCausalLM
from octavo.models.ministral3 import Ministral3ForCausalLM
from octavo.models.mistral import MistralForCausalLM
from octavo.models.mixtral import MixtralForCausalLM
from octavo.models.mpt import MptForCausalLM
from octavo.models.nemotron_h import NemotronHForCausalLM
from octavo.models.olmo2 import Olmo2ForCausalLM
from octavo.models.olmo3 import Olmo3ForCausalLM
from octavo.models.olmo_hybrid import OlmoHybridForCausalLM
from octavo.models.olmoe import OlmoeForCausalLM
from octavo.models.phi import PhiForCausalLM
from octavo.models.phi3 import Phi3ForCausalLM
from octavo.models.qwen2 import Qwen2ForCausalLM
from octavo.models.qwen2_moe import Qwen2MoeForCausalLM
from octavo.models.qwen3 import Qwen3ForCausalLM
from octavo.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from octavo.models.qwen3_moe import Qwen3MoeForCausalLM
from octavo.models.qwen3_next import Qwen3NextForCausalLM
from octavo.models.smollm3 import SmolLM3ForCausalLM
from octavo.models.stablelm import StableLmForCausalLM
from octavo.models.stage import Stage
from octavo.models.static_embedding import STATIC_ARCHITECTURE, read_static_config
from octavo.models.text_part import text_part


class CausalLM(Protocol):
    """A model as the runner sees it.

    ``num_weights``: elements of all its matrices, however many bits each takes; set by the loader.
    """

    config: ModelConfig
    num_weights: int

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None: ...

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


class CausalLMClass(CausalLM, Protocol):
    """A family: its class is named as config.json spells its architecture.

    ``hf_defaults``: what its config.json may leave out. ``other_parts``: how the names of tensors
    begin that belong to no text model, and may be in its files.
    """

    hf_defaults: ClassVar[Mapping[str, Any]]
    other_parts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: OpSet,
        *,
        max_model_len: int,
        device: torch.device,
        stage: Stage | None = None,
    ) -> None: ...

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig: ...


_CLASSES: tuple[type[CausalLMClass], ...] = (
    BloomForCausalLM,
    GPTNeoForCausalLM,
    MptForCausalLM,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteForCausalLM,
    Cohere2ForCausalLM,
    Ernie4_5ForCausalLM,
    Ernie4_5_MoeForCausalLM,
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    GlmForCausalLM,
    GraniteMoeForCausalLM,
    HunYuanDenseV1ForCausalLM,
    HunYuanMoEV1ForCausalLM,
    MiniMaxM2ForCausalLM,
    Ministral3ForCausalLM,
    Olmo3ForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    BambaForCausalLM,
    FalconForCausalLM,
    FalconH1ForCausalLM,
    FalconMambaForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma4ForCausalLM,
    Gemma4UnifiedForCausalLM,
    GemmaForCausalLM,
    GptOssForCausalLM,
    GraniteForCausalLM,
    GraniteMoeHybridForCausalLM,
    JambaForCausalLM,
    KimiLinearForCausalLM,
    Lfm2ForCausalLM,
    Lfm2MoeForCausalLM,
    Lfm3ForCausalLM,
    Llama4ForCausalLM,
    LlamaForCausalLM,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    MiMoV2FlashForCausalLM,
    MiniMaxForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    NemotronHForCausalLM,
    Olmo2ForCausalLM,
    OlmoHybridForCausalLM,
    Phi3ForCausalLM,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    Qwen3NextForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    SmolLM3ForCausalLM,
    StableLmForCausalLM,
)
ARCHITECTURES: dict[str, type[CausalLMClass]] = {cls.__name__: cls for cls in _CLASSES}


# Decoders without their output head, as embedding models are saved: those that are proven so.
TRUNKS: dict[str, str] = {
    f"{family}Model": f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
# EmbeddingGemma.
TRUNKS["Gemma3TextModel"] = "Gemma3ForCausalLM"
_CLASSIFYING = ("Gemma", "Gemma2", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3")
# Decoders whose last token's state is classified in place of the next token: those that are proven.
CLASSIFIERS: dict[str, str] = {
    f"{family}ForSequenceClassification": f"{family}ForCausalLM" for family in _CLASSIFYING
}
# And those of which every token's state is classified.
CLASSIFIERS |= {
    f"{family}ForTokenClassification": f"{family}ForCausalLM" for family in _CLASSIFYING
}


def decoder_of(architecture: str) -> str:
    """The decoder that an embedder or a classifier is built on; any other name as it is."""
    return TRUNKS.get(architecture) or CLASSIFIERS.get(architecture, architecture)


class ModelRegistry:
    """The architectures that can be served."""

    @staticmethod
    def get_supported_archs() -> list[str]:
        """Architectures as config.json spells them, sorted."""
        return sorted(
            [
                *ARCHITECTURES,
                *ENCODERS,
                *FOREIGN_ENCODERS,
                *TRUNKS,
                *CLASSIFIERS,
                *COLBERT_ARCHITECTURES,
            ]
        )


def model_class(architecture: str) -> type[CausalLMClass]:
    """The class for an architecture.

    Raises:
        ModelLoadError: there is none; the message lists those that exist.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ModelRegistry.get_supported_archs())
        raise ModelLoadError(f"architecture {architecture!r} is not supported; known: {known}")
    return ARCHITECTURES[architecture]


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of the model that a config.json describes.

    An architecture of no family here may be one of transformers', which is then imported.

    Raises:
        ModelLoadError: an unknown architecture, or a value that is missing or impossible.
    """
    if is_colbert(raw):
        raw = colbert_trunk(raw)
    architecture = architecture_of(raw)
    if architecture in ENCODERS:
        return read_encoder_config(raw)
    if architecture in FOREIGN_ENCODERS:
        return read_foreign_encoder(raw)
    if architecture == STATIC_ARCHITECTURE:
        return read_static_config(raw)
    architecture = decoder_of(architecture)
    if architecture not in ARCHITECTURES and (text := text_part(raw)) is not None:
        family = model_class(architecture_of(text))
        return family.read_config(HfConfig(text, family.hf_defaults)).replace(is_part=True)
    if architecture not in ARCHITECTURES:
        from octavo.models import fallback

        try:
            return fallback.read_config(raw)
        except ModelLoadError as error:
            known = ", ".join(ModelRegistry.get_supported_archs())
            raise ModelLoadError(f"{error}; known: {known}") from error
    family = model_class(architecture)
    return family.read_config(HfConfig(raw, family.hf_defaults))
