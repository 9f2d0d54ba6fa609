"""octavo: a server for language models, vLLM's interface from one small, fast process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from octavo.beam_search import BeamSearchParams
    from octavo.config import EngineConfig
    from octavo.engine.engine import AsyncEngine
    from octavo.llm import LLM
    from octavo.models.registry import ModelRegistry
    from octavo.outputs import CompletionOutput, RequestOutput
    from octavo.sampling_params import SamplingParams
    from octavo.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "ModelRegistry",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_HOMES = {
    "LLM": "octavo.llm",
    "AsyncEngine": "octavo.engine.engine",
    "BeamSearchParams": "octavo.beam_search",
    "CompletionOutput": "octavo.outputs",
    "EngineConfig": "octavo.config",
    "ModelRegistry": "octavo.models.registry",
    "RequestOutput": "octavo.outputs",
    "SamplingParams": "octavo.sampling_params",
    "StructuredOutputsParams": "octavo.structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``octavo --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
