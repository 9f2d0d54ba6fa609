"""octavo: a server for language models, vLLM's interface from one small, fast process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from octavo.engine.async_llm_engine import AsyncLLM, AsyncLLMEngine
    from octavo.engine.engine import AsyncEngine
    from octavo.engine.llm_engine import LLMEngine
    from octavo.inputs import PromptType, TextPrompt, TokensPrompt
    from octavo.llm import LLM
    from octavo.models.registry import ModelRegistry
    from octavo.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from octavo.pooling_params import PoolingParams
    from octavo.sampling_params import BeamSearchParams, SamplingParams
    from octavo.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "LLMEngine",
    "ModelRegistry",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

_HOMES = {
    "LLM": "octavo.llm",
    "AsyncEngine": "octavo.engine.engine",
    "AsyncEngineArgs": "octavo.engine.arg_utils",
    "AsyncLLM": "octavo.engine.async_llm_engine",
    "AsyncLLMEngine": "octavo.engine.async_llm_engine",
    "BeamSearchParams": "octavo.sampling_params",
    "ClassificationOutput": "octavo.outputs",
    "ClassificationRequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "EmbeddingOutput": "octavo.outputs",
    "EmbeddingRequestOutput": "octavo.outputs",
    "EngineArgs": "octavo.engine.arg_utils",
    "EngineConfig": "octavo.config",
    "LLMEngine": "octavo.engine.llm_engine",
    "ModelRegistry": "octavo.models.registry",
    "PoolingOutput": "octavo.outputs",
    "PoolingParams": "octavo.pooling_params",
    "PoolingRequestOutput": "octavo.outputs",
    "PromptType": "octavo.inputs",
    "RequestOutput": "octavo.outputs",
    "SamplingParams": "octavo.sampling_params",
    "ScoringOutput": "octavo.outputs",
    "ScoringRequestOutput": "octavo.outputs",
    "StructuredOutputsParams": "octavo.structured_outputs",
    "TextPrompt": "octavo.inputs",
    "TokensPrompt": "octavo.inputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``octavo --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
