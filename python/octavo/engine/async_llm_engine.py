"""AsyncLLM: AsyncEngine behind vLLM's interface for programs on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from octavo._core import TokenIds
from octavo.engine.engine import AsyncEngine, PauseMode
from octavo.engine.prompts import Prompt, prompt_parts, refuse_adapter
from octavo.errors import EngineDeadError, InvalidParameterError
from octavo.late_interaction import encode_form, form_of
from octavo.metrics_reader import Metric, read_metrics
from octavo.models.hf_tokenizer import hf_tokenizer
from octavo.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput
from octavo.pooling import (
    NO_TOKENS,
    EncodedText,
    check_params,
    encode_text,
    max_text_len,
    pooled_values,
)
from octavo.pooling_params import PoolingParams

if TYPE_CHECKING:
    from octavo._core import Delta
    from octavo.engine.model_facts import ModelFacts
    from octavo.sampling_params import SamplingParams


class AsyncLLM:
    """An engine whose requests are async generators. Belongs to the event loop of its first one.

    Args:
        engine: loaded, and not started: that is done by the first request.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    @classmethod
    def from_engine_args(cls, engine_args: Any, **ignored: Any) -> AsyncLLM:
        """Load the model that AsyncEngineArgs describe; blocks.

        Raises:
            ValueError, OSError: the model cannot be loaded, or an argument is refused.
        """
        return cls(AsyncEngine(engine_args.create_engine_config()))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yield a request's outputs, as ``sampling_params.output_kind`` has them.

        Leaving the loop ends the request. ``trace_headers`` make no difference.

        Raises:
            InvalidParameterError, RequestTooLongError, UnsupportedParameterError: it can never run.
            QueueFullError, PausedError, EngineDeadError: as AsyncEngine's.
        """
        refuse_adapter(lora_request)
        await self._start()
        outputs = self.engine.generate(
            prompt,
            sampling_params,
            request_id,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
        )
        async with contextlib.aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                yield output

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[PoolingRequestOutput]:
        """Yield the one output of a text through a pooling model.

        Raises:
            ValueError: the model generates text, or is for another task.
            InvalidParameterError, RequestTooLongError, UnsupportedParameterError: as ``generate``.
        """
        refuse_adapter(lora_request)
        await self._start()
        engine = self.engine
        params = (pooling_params or PoolingParams()).clone()
        if (info := engine.pooling) is None:
            raise ValueError("this model generates text: encode needs one that gives vectors")
        most = max_text_len(params.truncate_prompt_tokens, engine.max_model_len)
        text, given_ids = prompt_parts(prompt)
        check_params(params, info)
        form = form_of(info, params.embedding_mode)
        if form is not None and text is None:
            raise InvalidParameterError("embedding_mode needs prompts of text", "embedding_mode")
        if form is not None:
            assert text is not None
            whole = info.prompts.find(None) + text
            encoded = encode_form(engine.tokenizer, whole, form, most)
        elif given_ids is None:
            assert text is not None
            given_ids = encode_text(engine.tokenizer, info.prompts.find(None) + text, most)
            encoded = EncodedText(given_ids)
        else:
            encoded = EncodedText(list(given_ids)[:most])
        token_ids = list(encoded.token_ids)
        result: asyncio.Future[Delta] = asyncio.get_running_loop().create_future()

        def take(news: Delta | EngineDeadError) -> None:
            if result.cancelled():
                return
            if isinstance(news, EngineDeadError):
                result.set_exception(news)
            else:
                result.set_result(news)

        ids = engine.submit(
            TokenIds(token_ids), NO_TOKENS, take, priority=priority, num_first=encoded.num_first
        )
        try:
            delta = await result
        finally:
            engine.abort(ids)
        values = torch.tensor(pooled_values(encoded.kept_of(delta.extra), info, params))
        yield PoolingRequestOutput(request_id or uuid.uuid4().hex, token_ids, PoolingOutput(values))

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests by their ids; each yields a last output. Unknown ids are ignored."""
        ids = [request_id] if isinstance(request_id, str) else request_id
        self.engine.abort_request(ids)

    async def _start(self) -> None:
        if not self.engine.is_started:
            await self.engine.start()

    @property
    def model_config(self) -> ModelFacts:
        """The loaded model's shape and limits."""
        return self.engine.model_facts

    async def get_model_config(self) -> ModelFacts:
        """The same, as older programs ask for it."""
        return self.engine.model_facts

    async def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it."""
        return hf_tokenizer(self.engine.source)

    @property
    def is_running(self) -> bool:
        """True until the engine has died or is shut down."""
        return self.engine.is_alive and not self.engine.is_stopped

    @property
    def is_stopped(self) -> bool:
        """True once it is shut down, or has died."""
        return not self.is_running

    @property
    def errored(self) -> bool:
        """True once the engine has died."""
        return not self.engine.is_alive

    @property
    def dead_error(self) -> BaseException:
        """The error of every request from then on."""
        return EngineDeadError()

    async def check_health(self) -> None:
        """Raises EngineDeadError where no request can be served."""
        if not self.is_running or not self.engine.is_healthy:
            raise EngineDeadError

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As LLMEngine's."""
        return self.engine.reset_prefix_cache()

    def get_metrics(self) -> list[Metric]:
        """The engine's counters, gauges and histograms since it was made."""
        name = self.engine.served_model_names[0]
        return read_metrics(self.engine.metrics.snapshot(), name)

    async def pause_generation(
        self, *, mode: PauseMode = "abort", clear_cache: bool = True
    ) -> None:
        """Generate nothing until ``resume_generation``: see ``AsyncEngine.pause``.

        Raises:
            ValueError, EngineDeadError: as there.
        """
        await self._start()
        await self.engine.pause(mode, clear_cache=clear_cache)

    async def resume_generation(self) -> None:
        """End a pause."""
        await self._start()
        self.engine.resume()

    async def is_paused(self) -> bool:
        """True from the beginning of ``pause_generation`` to ``resume_generation``."""
        return self.engine.is_paused

    async def do_log_stats(self) -> None:
        """Nothing: octavo's server logs its throughput by itself, and an engine never does."""

    async def is_sleeping(self) -> bool:
        """False: octavo has no sleep mode."""
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine's thread after the step in flight, and every request with an error."""
        self.engine.stop_now()


AsyncLLMEngine = AsyncLLM
