"""LLM: the offline API. The caller's thread steps the engine; there is no server and no loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from octavo.beam_search import BeamSearchOutput, search
from octavo.conversations import Conversations, Message, Turn
from octavo.engine.arg_utils import make_engine_config
from octavo.engine.prompts import (
    Prompt,
    checked_ids,
    encode_prompt,
    prompt_parts,
    prompt_salt,
    refuse_adapter,
)
from octavo.engine.trace import StepTrace
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.llm_pooling import PoolingLLM
from octavo.metrics_reader import Metric
from octavo.offline import UseTqdm, as_batch, progress_bar
from octavo.outputs import RequestOutput
from octavo.profiler_config import ProfilerConfig
from octavo.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from octavo._core import Delta, Tokenizer
    from octavo.engine.model_facts import ModelFacts
    from octavo.runner.request_state import RequestState

Priorities = int | Sequence[int] | None


class _Prepared(NamedTuple):
    """A request that is checked and not queued yet.

    ``tokenizer``: None leaves texts empty; ``turn``: of a conversation, None for a plain prompt.
    """

    samples: list[RequestState]
    output: RequestOutput
    tokenizer: Tokenizer | None
    turn: Turn | None


class LLM(PoolingLLM):
    """A model in this process.

    Calls from several threads take turns. An interrupted call leaves an engine that can be used
    again. A forked child needs an LLM of its own: threads do not survive a fork.

    Args:
        model: folder, .gguf file or hub id; None is SmolLM2-135M-Instruct.
        chat_template: for ``chat``, in place of the model's own, and for ``score``.
        profiler_config: ``torch_profiler_dir`` is where ``stop_profile`` writes; ``profiler`` makes
            no difference.
        config: further fields of EngineConfig, or vLLM's arguments; None is the field's default.

    Raises:
        TypeError: an argument that neither octavo nor vLLM has; the message names it.
        ValueError, OSError: the model cannot be loaded, or an argument of vLLM's is refused.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        chat_template: str | None = None,
        profiler_config: ProfilerConfig | Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        super().__init__(make_engine_config("LLM", {"model": model, **config}))
        self._chat_template = chat_template
        self._conversations = Conversations(self._engine, chat_template)
        folder = ProfilerConfig.of(profiler_config).torch_profiler_dir
        self._profile_folder = Path(folder or "octavo-profile")
        # Between start_profile and stop_profile: the trace, and its file's name.
        self._profile: tuple[StepTrace, str] | None = None
        self._num_profiles = 0
        # What ``enqueue`` and ``enqueue_chat`` were given.
        self._queued: list[_Prepared] = []

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers has it, which is imported now."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults of the model's generation_config.json."""
        return SamplingParams(**self._engine.source.generation_defaults)

    @property
    def model_config(self) -> ModelFacts:
        """The loaded model's shape and limits."""
        return self.llm_engine.model_config

    @contextlib.contextmanager
    def trace(self, file: str | Path) -> Iterator[StepTrace]:
        """Trace the steps of the block, and write them to a file for Perfetto."""
        trace = StepTrace(self._engine)
        try:
            yield trace
        finally:
            trace.detach()
            trace.write(Path(file))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Priorities = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs are in the prompts' order.

        Args:
            prompts: one prompt or several: text, token ids, or ``{"prompt_token_ids": [...]}``.
            sampling_params: one for all or one per prompt; the model's defaults if None.
            use_tqdm: False hides the progress bar; a class makes it.
            lora_request, mm_processor_kwargs: refused.
            priority: one for all or one per prompt, the lowest runs first; without
                ``scheduling_policy="priority"`` they run as they came.
            tokenization_kwargs: ``add_special_tokens`` and ``truncate_prompt_tokens``.

        Raises:
            InvalidParameterError, RequestTooLongError, UnsupportedParameterError: before anything
                has run.
            RuntimeError: the model failed on a request.
        """
        _refuse_others(lora_request, mm_processor_kwargs)
        asked = as_batch(prompts), sampling_params, priority, tokenization_kwargs
        return self._alone(lambda: self._complete(self._prepare(*asked), use_tqdm))

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: None = None,
        priority: Priorities = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """Check prompts, and leave them for ``wait_for_completion``; their request ids.

        Args and Raises: as for ``generate``. There is nothing to show the progress of.
        """
        _refuse_others(lora_request, mm_processor_kwargs)
        return self._enqueue(as_batch(prompts), sampling_params, priority, tokenization_kwargs)

    def wait_for_completion(
        self,
        output_type: type[Any] | tuple[type[Any], ...] | None = None,
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[RequestOutput]:
        """Complete all that has been enqueued since the last call, in its order.

        Args:
            output_type: RequestOutput, or several types with it: there are no others.

        Raises:
            TypeError: another type; what has been enqueued stays so.
            RuntimeError: the model failed on a request.
        """
        types = output_type if isinstance(output_type, tuple) else (output_type or RequestOutput,)
        if not any(issubclass(RequestOutput, one) for one in types):
            raise TypeError(f"what is enqueued has outputs of RequestOutput, not {output_type!r}")
        queued, self._queued = self._queued, []
        return self._alone(lambda: self._complete(queued, use_tqdm))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Priorities = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role", "content"}``.

        Args:
            continue_final_message: let the model go on with the last message.
            chat_template_content_format: "auto", "string" or "openai": the template is asked.
            tools: functions that the model may call, in OpenAI's form. The calls it makes are the
                outputs' ``tool_calls``: of these functions, and by their schemas where ``strict``.
            chat_template_kwargs: further variables of the template.

        Args and Raises beside these: as for ``generate``.

        Raises:
            ValueError: the model has no chat template and none is given.
            InvalidParameterError: a tool is not one.
        """
        _refuse_others(lora_request, mm_processor_kwargs)
        turns = self._conversations.render(
            messages,
            chat_template,
            chat_template_content_format,
            add_generation_prompt,
            continue_final_message,
            tools,
            chat_template_kwargs,
        )
        asked = turns, sampling_params, priority, tokenization_kwargs
        return self._alone(lambda: self._complete(self._prepare(*asked), use_tqdm))

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Priorities = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """Render conversations, and leave them for ``wait_for_completion``; their request ids.

        Args and Raises: as for ``chat``. There is nothing to show the progress of.
        """
        _refuse_others(lora_request, mm_processor_kwargs)
        turns = self._conversations.render(
            messages,
            chat_template,
            chat_template_content_format,
            add_generation_prompt,
            continue_final_message,
            tools,
            chat_template_kwargs,
        )
        return self._enqueue(turns, sampling_params, priority, tokenization_kwargs)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: UseTqdm = False,
        lora_request: None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, the best first; see ``BeamSearchParams``.

        Raises:
            InvalidParameterError: among others, where ``2 * beam_width`` is more than
                ``max_logprobs``, or a prompt leaves no room for ``max_tokens``.
            RequestTooLongError: a prompt leaves no room for one token.
        """
        refuse_adapter(lora_request)
        tokenizer, limits = self._engine.tokenizer, self._engine.limits
        wanted = SamplingParams(max_tokens=params.max_tokens)
        token_ids: list[Sequence[int]] = []
        for prompt in as_batch(prompts):
            text, ids = prompt_parts(prompt)
            if ids is None:
                assert text is not None
                ids = tokenizer.encode(text)
            if (room := limits.check(checked_ids(ids), wanted)) < params.max_tokens:
                raise InvalidParameterError(
                    f"max_tokens must be at most {room} after this prompt of {len(ids)} tokens",
                    "max_tokens",
                )
            token_ids.append(ids)

        def step(beams: Sequence[Prompt], sampling: SamplingParams) -> list[RequestOutput]:
            return self.generate(beams, sampling, use_tqdm=False)

        def decode(tokens: list[int]) -> str:
            return tokenizer.decode(tokens, skip_special_tokens=False)

        with progress_bar(use_tqdm, params.max_tokens, "beam search") as progress:
            return search(
                token_ids,
                params,
                step,
                decode,
                self._engine.source.eos_token_ids,
                progress.update,
            )

    def _enqueue(self, *asked: Any) -> list[str]:
        """Check what ``_prepare`` takes, and keep it for ``wait_for_completion``."""
        prepared = self._alone(lambda: self._prepare(*asked))
        self._queued += prepared
        return [one.output.request_id for one in prepared]

    def _per_prompt(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        # Copies: what their owner does with them later is no concern of the requests'.
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params.clone()] * num_prompts
        if not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise TypeError("sampling_params must be SamplingParams, one or one per prompt")
        if len(sampling_params) != num_prompts:
            raise ValueError(f"{len(sampling_params)} sampling params for {num_prompts} prompts")
        copies = {id(params): params for params in sampling_params}
        copies = {key: params.clone() for key, params in copies.items()}
        return [copies[id(params)] for params in sampling_params]

    def _prepare(
        self,
        prompts: Sequence[Prompt | Turn],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Priorities,
        tokenization_kwargs: Mapping[str, Any] | None,
    ) -> list[_Prepared]:
        """Check all, before any runs: a bad prompt must not leave its neighbours running."""
        params = self._per_prompt(sampling_params, len(prompts))
        priorities = _priorities(priority, len(prompts))
        engine = self._engine
        if (info := engine.runner.pooling) is not None:
            raise ValueError(f"this model generates no text: use {info.task}")
        prepared = []
        most = engine.limits.max_model_len
        for one, sampling, rank in zip(prompts, params, priorities, strict=True):
            turn = one if isinstance(one, Turn) else None
            prompt = one.prompt if isinstance(one, Turn) else one
            if turn is not None:
                sampling = self._conversations.bind(turn, sampling)
            text, token_ids = encode_prompt(
                prompt, engine.tokenizer, most, sampling, tokenization_kwargs
            )
            samples = engine.prepare(
                token_ids,
                sampling,
                priority=rank,
                cache_salt=prompt_salt(prompt),
                reasoning=turn and turn.reasoning,
            )
            output = RequestOutput.begin(str(samples[0].request_id), text, token_ids, sampling)
            tokenizer = engine.tokenizer if sampling.detokenize else None
            prepared.append(_Prepared(samples, output, tokenizer, turn))
        return prepared

    def _complete(self, prepared: Sequence[_Prepared], use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Run all to their end."""
        # Sample id -> its request, and its index there.
        places = {
            sample.request_id: (one, index)
            for one in prepared
            for index, sample in enumerate(one.samples)
        }

        def take(delta: Delta) -> bool:
            one, index = places[delta.request_id]
            one.output.apply(index, delta, one.tokenizer)
            return one.output.finished

        self._run_to_end([one.samples for one in prepared], take, use_tqdm)
        for one in prepared:
            if one.turn is not None:
                self._conversations.take_apart(one.output, one.turn)
        return [one.output for one in prepared]

    # ------------------------------------------------------------- around the requests

    def get_metrics(self) -> list[Metric]:
        """The engine's counters, gauges and histograms since it was made."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget all cached prefixes. No request runs between two calls, and there is no connector:
        the arguments make no difference."""
        return self._alone(self.llm_engine.reset_prefix_cache)

    def sleep(self, level: int = 1, mode: str = "abort") -> NoReturn:
        """Raises NotImplementedError: octavo has no sleep mode."""
        raise NotImplementedError("octavo has no sleep mode: delete the LLM to free its memory")

    def wake_up(self, tags: Sequence[str] | None = None) -> NoReturn:
        """Raises NotImplementedError: octavo has no sleep mode."""
        raise NotImplementedError("octavo has no sleep mode")

    def collective_rpc(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: there are no workers to call."""
        raise NotImplementedError("octavo has no workers to call: the model is in this process")

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Trace the steps from now on, as ``trace`` does.

        Raises:
            RuntimeError: it is done already.
        """
        if self._profile is not None:
            raise RuntimeError("a profile has been started already")
        trace = self._alone(lambda: StepTrace(self._engine))
        self._profile = trace, profile_prefix or "octavo"

    def stop_profile(self) -> None:
        """End the trace, and write it to a file of its own for Perfetto.

        Raises:
            RuntimeError: no profile has been started.
            OSError: the file cannot be written.
        """
        if self._profile is None:
            raise RuntimeError("no profile has been started")
        (trace, name), self._profile = self._profile, None
        self._alone(trace.detach)
        self._num_profiles += 1
        self._profile_folder.mkdir(parents=True, exist_ok=True)
        trace.write(self._profile_folder / f"{name}-{self._num_profiles}.json")


def _refuse_others(lora_request: object, mm_processor_kwargs: object) -> None:
    """Raises UnsupportedParameterError for what octavo has neither adapters nor pictures for."""
    refuse_adapter(lora_request)
    if mm_processor_kwargs:
        raise UnsupportedParameterError("octavo takes text alone", "mm_processor_kwargs")


def _priorities(priority: Priorities, num_prompts: int) -> list[int]:
    """One priority per prompt.

    Raises:
        ValueError: there are more or fewer.
    """
    if priority is None or isinstance(priority, int):
        return [priority or 0] * num_prompts
    if len(priority) != num_prompts:
        raise ValueError(f"{len(priority)} priorities for {num_prompts} prompts")
    return list(priority)
