"""vllm_utils: what vLLM's tests import as ``tests.utils``, over an octavo server that runs already.

test_vllm_suite.py puts it there, and the server's address into ``OCTAVO_SUITE_URL``.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self


class RemoteOpenAIServer:
    """The running server, whatever model and flags a test asks for."""

    def __init__(self, model: str, args: list[str], **options: Any) -> None:
        self._url = os.environ["OCTAVO_SUITE_URL"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def get_async_client(self, **options: Any) -> Any:
        """OpenAI's client."""
        import openai

        url = self._url + "/v1"
        return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, **options)

    def get_async_client_anthropic(self, **options: Any) -> Any:
        """Anthropic's client."""
        import anthropic

        return anthropic.AsyncAnthropic(
            base_url=self._url, api_key="none", max_retries=0, **options
        )
