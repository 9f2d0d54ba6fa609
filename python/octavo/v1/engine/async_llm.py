"""AsyncLLM, where vLLM has it."""

from octavo.engine.async_llm_engine import AsyncLLM

__all__ = ["AsyncLLM"]
