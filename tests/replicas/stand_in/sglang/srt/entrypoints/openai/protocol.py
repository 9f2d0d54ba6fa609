"""A stand-in for the models of OpenAI's interface that Ray Serve LLM takes from an engine of its own.

Ray imports them from vLLM or SGLang, both too large to install for a test. Fields are not checked
here: octavo checks them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ChatCompletionRequest(_Open):
    model: str | None = None
    messages: list[dict[str, Any]]
    stream: bool = False


class CompletionRequest(_Open):
    model: str | None = None
    prompt: Any
    stream: bool = False


class EmbeddingRequest(_Open):
    model: str | None = None
    input: Any


class ScoringRequest(_Open):
    model: str | None = None


class TokenizeRequest(_Open):
    model: str | None = None


class DetokenizeRequest(_Open):
    model: str | None = None


class ChatCompletionResponse(_Open):
    pass


class ChatCompletionStreamResponse(_Open):
    pass


class CompletionResponse(_Open):
    pass


class CompletionStreamResponse(_Open):
    pass


class EmbeddingResponse(_Open):
    pass


class ScoringResponse(_Open):
    pass


class TokenizeResponse(_Open):
    pass


class DetokenizeResponse(_Open):
    pass
