"""The text model of a multimodal config.json, which is served by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from octavo.models.config import token_ids

# The model_type of a text_config -> its architecture. Where a model turns text by positions of
# several dimensions (mrope), those of text are equal, and it is the plain rotation.
TEXT_MODELS: Final = {
    "cohere2": "Cohere2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
# What the whole may say in the text model's place.
_SHARED: Final = ("dtype", "tie_word_embeddings", "torch_dtype")


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The text model's config.json, with an architecture of its own; None where none is known."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        return None
    architecture = TEXT_MODELS.get(str(text.get("model_type")))
    if architecture is None:
        return None
    shared = {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    found = {**shared, **text, "architectures": [architecture]}
    # Either may name an end that the other leaves out, such as that of a turn.
    if ends := dict.fromkeys(
        one for part in (text, raw) for one in token_ids(part.get("eos_token_id"))
    ):
        found["eos_token_id"] = [*ends]
    # Heads are tied by the whole's word.
    tied = shared.get("tie_word_embeddings", found.get("tie_word_embeddings"))
    return found if tied is None else {**found, "tie_word_embeddings": tied}
