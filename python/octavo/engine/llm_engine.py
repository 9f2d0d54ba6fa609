"""LLMEngine: requests added one by one, and stepped by their caller; vLLM's interface."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from octavo.engine.engine_loop import EngineLoop
from octavo.engine.model_facts import ModelFacts
from octavo.engine.prompts import Prompt, encode_prompt, prompt_salt, refuse_adapter
from octavo.errors import InvalidParameterError
from octavo.metrics_reader import Metric, read_metrics
from octavo.models.hf_tokenizer import hf_tokenizer
from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from octavo._core import Delta, Tokenizer


@dataclass(slots=True)
class _Running:
    """One request. ``first_id``: of its samples in the core, which are consecutive."""

    output: RequestOutput
    first_id: int
    kind: RequestOutputKind
    tokenizer: Tokenizer | None


class LLMEngine:
    """An engine that steps when it is told to. Belongs to one thread.

    Args:
        loop: loaded, and stepped by nobody else while requests are unfinished.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._pid = os.getpid()
        self._requests: dict[str, _Running] = {}
        # By the core's ids.
        self._samples: dict[int, _Running] = {}

    @classmethod
    def from_engine_args(cls, engine_args: Any, **ignored: Any) -> LLMEngine:
        """Load the model that EngineArgs describe.

        Raises:
            ValueError, OSError: the model cannot be loaded, or an argument is refused.
        """
        loop = EngineLoop(engine_args.create_engine_config())
        loop.finish_warm_up()
        return cls(loop)

    @property
    def model_config(self) -> ModelFacts:
        """The loaded model's shape and limits."""
        return ModelFacts(self._loop)

    @property
    def vllm_config(self) -> Any:
        """A holder of ``model_config``, as programs for vLLM find it."""
        return SimpleNamespace(model_config=self.model_config)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it."""
        return hf_tokenizer(self._loop.source)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request; ``step`` returns its outputs, as ``params.output_kind`` has them.

        ``arrival_time`` makes no difference: it is now.

        Raises:
            InvalidParameterError, RequestTooLongError: it can never run, or its id is taken.
            UnsupportedParameterError: an argument that octavo has no use for.
            RuntimeError: in a forked child.
        """
        self._check_process()
        if request_id in self._requests:
            raise InvalidParameterError(f"request_id {request_id!r} is taken", "request_id")
        refuse_adapter(lora_request)
        params = params.clone()
        loop = self._loop
        text, token_ids = encode_prompt(
            prompt, loop.tokenizer, loop.limits.max_model_len, params, tokenization_kwargs
        )
        is_final = params.output_kind is RequestOutputKind.FINAL_ONLY
        samples = loop.prepare(
            token_ids,
            params,
            delivery="final" if is_final else "delta",
            priority=priority,
            cache_salt=prompt_salt(prompt),
        )
        output = RequestOutput.begin(request_id, text, token_ids, params)
        running = _Running(
            output,
            samples[0].request_id,
            params.output_kind,
            loop.tokenizer if params.detokenize else None,
        )
        self._requests[request_id] = running
        self._samples.update(dict.fromkeys((sample.request_id for sample in samples), running))
        loop.submit(samples)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("an engine does not work in a forked child: make one there")

    def abort_request(self, request_ids: Iterable[str]) -> None:
        """End requests; no output of theirs comes any more. Unknown ids are ignored."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            running = self._requests.pop(request_id, None)
            if running is not None:
                first = running.first_id
                ids = range(first, first + len(running.output.outputs))
                for sample_id in ids:
                    self._samples.pop(sample_id, None)
                self._loop.abort(ids)
        self._loop.take_commands()
        if not self._requests:
            self._loop.core.outbox.drain()

    def has_unfinished_requests(self) -> bool:
        """True while ``step`` has anything to do."""
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def step(self) -> list[RequestOutput]:
        """One step of the model; the outputs of the requests that it brought news of.

        An output whose samples have the ``finish_reason`` "error" is a request that failed. An
        interrupted step ends all requests.

        Raises:
            RuntimeError: in a forked child.
        """
        if not self._requests:
            return []
        self._check_process()
        try:
            self._loop.step()
            deltas = self._loop.core.outbox.drain()
        except BaseException:
            # An interrupt may have come anywhere: what ran cannot go on, what comes can.
            self._requests.clear()
            self._samples.clear()
            self._loop.abandon()
            raise
        outputs: dict[int, RequestOutput] = {}
        for delta in deltas:
            running = self._samples.get(delta.request_id)
            if running is not None and (output := self._apply(running, delta)) is not None:
                outputs[id(output)] = output
        return list(outputs.values())

    def _apply(self, running: _Running, delta: Delta) -> RequestOutput | None:
        index = delta.request_id - running.first_id
        output = running.output
        if running.kind is RequestOutputKind.DELTA:
            output = output.take(index, delta, running.tokenizer)
        else:
            output.apply(index, delta, running.tokenizer)
        if delta.finish_reason is not None:
            del self._samples[delta.request_id]
            if output.finished:
                del self._requests[output.request_id]
        elif running.kind is RequestOutputKind.FINAL_ONLY:
            return None
        if running.kind is RequestOutputKind.FINAL_ONLY and not output.finished:
            return None
        return output

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget all cached prefixes; False, and nothing is done, while requests run.

        The arguments make no difference: requests that run keep their blocks, and there is no
        connector.
        """
        if self._requests:
            return False
        self._loop.core.reset_prefix_cache()
        return True

    def get_metrics(self) -> list[Metric]:
        """The engine's counters, gauges and histograms since it was made."""
        return read_metrics(self._loop.core.metrics.snapshot(), self._loop.source.name)
