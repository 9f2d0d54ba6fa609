"""LLM: the offline API. The caller's thread steps the engine; there is no server and no loop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm

from octavo.beam_search import BeamSearchOutput, BeamSearchParams, search
from octavo.config import EngineConfig
from octavo.engine.engine import Prompt, checked_ids, is_token_id, prompt_parts, prompt_salt
from octavo.engine.engine_loop import EngineLoop
from octavo.engine.trace import StepTrace
from octavo.errors import InvalidParameterError
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
    ToolCall,
)
from octavo.pooling import (
    NO_TOKENS,
    EncodedText,
    PoolingInfo,
    cosine,
    encode_pair,
    encode_text,
    max_text_len,
    probabilities,
    squash,
)
from octavo.sampling_params import SamplingParams
from octavo.text.answer_parts import answer_parts
from octavo.text.chat_format import ChatFormat, find_chat_format
from octavo.text.chat_template import ChatTemplate
from octavo.text.tools import call_id, parse_tool_use, parse_tools

if TYPE_CHECKING:
    from octavo._core import Channels, Delta, Tokenizer
    from octavo.pooling import Vector
    from octavo.runner.request_state import RequestState
    from octavo.structured_outputs import ReasoningTokens

Message = Mapping[str, Any]

T = TypeVar("T")


class LLM:
    """A model in this process.

    Calls from several threads take turns. An interrupted call leaves an engine that can be used
    again. A forked child needs an LLM of its own: threads do not survive a fork.

    Args:
        model: folder, .gguf file or hub id; None is SmolLM2-135M-Instruct.
        config: further fields of EngineConfig; None is the field's default.

    Raises:
        TypeError: an argument that LLM does not have; the message names it.
        ValueError, OSError: the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(config.keys() - known):
            raise TypeError(f"LLM() has no argument {unknown[0]!r}")
        given = {name: value for name, value in config.items() if value is not None}
        self.config = EngineConfig(model=model, **given)
        self._engine = EngineLoop(self.config)
        self._engine.finish_warm_up()
        self._pid = os.getpid()
        # Held by the call that steps the engine, on the thread ``_owner``.
        self._lock = threading.Lock()
        self._owner: int | None = None
        # True while the engine is known to be empty.
        self._is_clean = True
        # The format of the last chat's template, by the template's text.
        self._format: tuple[str, ChatFormat] | None = None

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults of the model's generation_config.json."""
        return SamplingParams(**self._engine.source.generation_defaults)

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
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs are in the prompts' order.

        Args:
            prompts: one prompt or several: text, token ids, or ``{"prompt_token_ids": [...]}``.
            sampling_params: one for all or one per prompt; the model's defaults if None.

        Raises:
            InvalidParameterError, RequestTooLongError: before anything has run.
            RuntimeError: the model failed on a request.
        """
        batch = as_batch(prompts)
        params = self._per_prompt(sampling_params, len(batch))
        return self._alone(lambda: self._generate(batch, params, use_tqdm))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role", "content"}``.

        Args:
            continue_final_message: let the model go on with the last message.
            tools: functions that the model may call, in OpenAI's form. The calls it makes are the
                outputs' ``tool_calls``.
            chat_template_kwargs: further variables of the template.

        Raises:
            ValueError: the model has no chat template and none is given.
            InvalidParameterError: a tool is not one.
        """
        own = self._engine.source
        source = chat_template or (own.tool_template if tools else None) or own.chat_template
        if source is None:
            raise ValueError("the model has no chat template: pass chat_template")
        template = ChatTemplate(source, self._engine.source.special_tokens)
        use = parse_tool_use(parse_tools("tools", tools or ()))
        conversations: Iterable[Any] = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        tokenizer = self._engine.tokenizer
        prompts: list[Prompt] = []
        channels: list[Channels | None] = []
        reasoning: list[ReasoningTokens | None] = []
        form = self._chat_format(source, template)
        for conversation in conversations:
            text = template.render(
                list(conversation),
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tools=use.definitions,
                **(chat_template_kwargs or {}),
            )
            # The template has written the special tokens already.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, False)})
            last = conversation[-1].get("content") if continue_final_message else None
            continued = last if isinstance(last, str) else ""
            channels.append(form.channels(text, use, continued))
            reasoning.append(form.reasoning_tokens(tokenizer.token_to_id, text, continued))
        params = self._per_prompt(sampling_params, len(prompts))
        outputs = self._alone(lambda: self._generate(prompts, params, use_tqdm, reasoning))
        for output, settings in zip(outputs, channels, strict=True):
            if settings is not None:
                for sample in output.outputs:
                    self._take_apart(sample, settings, form)
        return outputs

    def _chat_format(self, source: str, template: ChatTemplate) -> ChatFormat:
        """The format of a template; the last one is kept."""
        if self._format is None or self._format[0] != source:
            declared = self._engine.source.response_template
            self._format = source, find_chat_format(template, response_template=declared)
        return self._format[1]

    def _take_apart(self, output: CompletionOutput, channels: Channels, form: ChatFormat) -> None:
        """Fill in the parts of an answer."""
        token_ids = output.token_ids
        while token_ids and token_ids[-1] in self._engine.eos_token_ids:
            token_ids = token_ids[:-1]
        text = self._engine.tokenizer.decode(token_ids, skip_special_tokens=False)
        parts = answer_parts(text, channels)
        output.content, output.reasoning = parts.content, parts.reasoning
        output.tool_calls = [
            ToolCall(call_id(form.tool_calls, name, number), name, arguments)
            for number, (name, arguments) in enumerate(parts.calls)
        ]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, the best first; see ``BeamSearchParams``.

        Raises:
            InvalidParameterError: among others, where ``2 * beam_width`` is more than
                ``max_logprobs``, or a prompt leaves no room for ``max_tokens``.
            RequestTooLongError: a prompt leaves no room for one token.
        """
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

        progress = tqdm(total=params.max_tokens, desc="beam search", disable=not use_tqdm)
        with progress:
            return search(
                token_ids,
                params,
                step,
                decode,
                self._engine.source.eos_token_ids,
                progress.update,
            )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per text, in the prompts' order.

        Args:
            prompts: one prompt or several: text, token ids, or ``{"prompt_token_ids": [...]}``.
            truncate_prompt_tokens: cut texts to so many tokens, special ones included; -1 is the
                model's limit. None refuses what is longer than that. Token ids are cut at the end.

        Raises:
            ValueError: the model gives no vectors.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        self._pooling_info("embed")
        outputs = []
        for request_id, text, token_ids, vector in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            output = EmbeddingOutput(vector.tolist())
            outputs.append(EmbeddingRequestOutput(request_id, text, token_ids, output))
        return outputs

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label, of every text, in the prompts' order.

        They are a softmax of the model's logits; sigmoids where it has one label or its config.json
        says that several may hold (``multi_label_classification``); for ``regression`` the logits.

        Args:
            prompts, truncate_prompt_tokens: as for ``embed``.

        Raises:
            ValueError: the model is no classifier.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        info = self._pooling_info("classify", "score")
        outputs = []
        for request_id, _, token_ids, logits in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            output = ClassificationOutput(probabilities(logits, info.activation))
            outputs.append(ClassificationRequestOutput(request_id, token_ids, output))
        return outputs

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput]:
        """The output of ``embed`` or ``classify``, as one tensor per text.

        Args:
            prompts, truncate_prompt_tokens: as for ``embed``.
            pooling_task: "embed" or "classify"; None is the model's own.

        Raises:
            ValueError: another task, or not the model's: tokens have no outputs of their own.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        if pooling_task not in (None, "embed", "classify"):
            raise ValueError(f"pooling_task must be embed or classify, not {pooling_task!r}")
        wanted = {"embed": ("embed",), "classify": ("classify", "score")}.get(
            pooling_task or "", ("embed", "classify", "score")
        )
        info = self._pooling_info(*wanted)
        outputs = []
        for request_id, _, token_ids, vector in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            if info.task == "embed":
                data = torch.from_numpy(vector)
            else:
                data = torch.tensor(probabilities(vector, info.activation))
            outputs.append(PoolingRequestOutput(request_id, token_ids, PoolingOutput(data)))
        return outputs

    def _pool_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        truncate_prompt_tokens: int | None,
        use_tqdm: bool,
    ) -> list[tuple[str, str | None, list[int], Vector]]:
        """Each prompt's (request id, text, token ids, vector)."""
        most = max_text_len(truncate_prompt_tokens, self._engine.limits.max_model_len)
        parts = [prompt_parts(prompt) for prompt in as_batch(prompts)]
        tokenizer = self._engine.tokenizer
        # In one call: it uses several cores.
        encoded = iter(tokenizer.encode_batch([text or "" for text, ids in parts if ids is None]))
        texts = []
        for text, token_ids in parts:
            if token_ids is None:
                assert text is not None
                token_ids = next(encoded)
                if most is not None and len(token_ids) > most:
                    token_ids = encode_text(tokenizer, text, most)
            elif most is not None:
                token_ids = token_ids[:most]
            texts.append(EncodedText(token_ids))
        results = self._pool(texts, use_tqdm)
        return [
            (str(request_id), text, list(encoded.token_ids), vector)
            for (request_id, vector), (text, _), encoded in zip(results, parts, texts, strict=True)
        ]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_activation: bool = True,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """The scores of pairs: each text of ``text_2`` with its partner in ``text_1``.

        A single text in ``text_1`` is the partner of all.

        A cross-encoder reads both at once; its score passes through the function it was trained
        with unless ``use_activation`` is off. Other models' scores are cosines of their vectors.

        Args:
            truncate_prompt_tokens: as for ``embed``; a cross-encoder's pair is cut as a whole.

        Raises:
            ValueError: the model gives no vectors, or the texts do not pair up.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        info = self._pooling_info("embed", "score")
        firsts = [text_1] if isinstance(text_1, str) else list(text_1)
        seconds = [text_2] if isinstance(text_2, str) else list(text_2)
        if len(firsts) == 1:
            firsts *= len(seconds)
        if len(firsts) != len(seconds):
            raise ValueError(f"{len(firsts)} texts for {len(seconds)}: give one, or as many")
        most = max_text_len(truncate_prompt_tokens, self._engine.limits.max_model_len)
        tokenizer = self._engine.tokenizer
        if info.task == "score":
            pairs = [encode_pair(tokenizer, *p, most) for p in zip(firsts, seconds, strict=True)]
            results = self._pool(pairs, use_tqdm)
            ids = [request_id for request_id, _ in results]
            scores = [squash(logits, info.squashes and use_activation) for _, logits in results]
            token_ids = [list(pair.token_ids) for pair in pairs]
        else:
            # A text that is paired several times is computed once.
            texts = {
                text: EncodedText(encode_text(tokenizer, text, most))
                for text in dict.fromkeys([*firsts, *seconds])
            }
            done = dict(zip(texts, self._pool(list(texts.values()), use_tqdm), strict=True))
            couples = list(zip(firsts, seconds, strict=True))
            ids = [done[second][0] for second in seconds]
            scores = [cosine(done[a][1], done[b][1]) for a, b in couples]
            token_ids = [[*texts[a].token_ids, *texts[b].token_ids] for a, b in couples]
        return [
            ScoringRequestOutput(str(request_id), tokens, ScoringOutput(value))
            for request_id, tokens, value in zip(ids, token_ids, scores, strict=True)
        ]

    def _pooling_info(self, *tasks: str) -> PoolingInfo:
        info = self._engine.runner.pooling
        if info is None:
            raise ValueError(f"this model generates text: {tasks[0]} needs one that gives vectors")
        if info.task not in tasks:
            raise ValueError(f"this model does not {tasks[0]}: use {info.task}")
        return info

    def _pool(self, texts: Sequence[EncodedText], use_tqdm: bool) -> list[tuple[int, Vector]]:
        """Check all, then run all; each one's request id and vector."""
        return self._alone(lambda: self._pool_alone(texts, use_tqdm))

    def _pool_alone(self, texts: Sequence[EncodedText], use_tqdm: bool) -> list[tuple[int, Vector]]:
        prepare = self._engine.prepare
        requests = [
            prepare(checked_ids(text.token_ids), NO_TOKENS, num_first=text.num_first)
            for text in texts
        ]
        vectors: dict[int, Vector] = {}

        def take(delta: Delta) -> bool:
            vectors[delta.request_id] = delta.extra
            return True

        self._run_to_end(requests, take, use_tqdm)
        ids = [samples[0].request_id for samples in requests]
        return [(request_id, vectors[request_id]) for request_id in ids]

    def _per_prompt(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise TypeError("sampling_params must be SamplingParams, one or one per prompt")
        if len(sampling_params) != num_prompts:
            raise ValueError(f"{len(sampling_params)} sampling params for {num_prompts} prompts")
        return list(sampling_params)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        reasoning: Sequence[ReasoningTokens | None] = (),
    ) -> list[RequestOutput]:
        """Check all, then run all: a bad prompt must not leave its neighbours running.

        ``reasoning``: one per prompt, or none of any.
        """
        engine = self._engine
        if (info := engine.runner.pooling) is not None:
            raise ValueError(f"this model generates no text: use {info.task}")
        requests: list[list[RequestState]] = []
        outputs: list[RequestOutput] = []
        # Sample id -> its request's output, and its index there.
        places: dict[int, tuple[RequestOutput, int]] = {}
        thoughts = reasoning or [None] * len(prompts)
        for prompt, sampling, thought in zip(prompts, params, thoughts, strict=True):
            text, given_ids = prompt_parts(prompt)
            if given_ids is None:
                assert text is not None
                token_ids = engine.tokenizer.encode_ids(text)
            else:
                token_ids = checked_ids(given_ids)
            salt = prompt_salt(prompt)
            samples = engine.prepare(token_ids, sampling, cache_salt=salt, reasoning=thought)
            output = RequestOutput(
                request_id=str(samples[0].request_id),
                prompt=text,
                prompt_token_ids=list(token_ids),
                outputs=[CompletionOutput(index) for index in range(sampling.n)],
            )
            requests.append(samples)
            outputs.append(output)
            for index, sample in enumerate(samples):
                places[sample.request_id] = output, index

        def take(delta: Delta) -> bool:
            output, index = places[delta.request_id]
            output.apply(index, delta, engine.tokenizer)
            return output.finished

        self._run_to_end(requests, take, use_tqdm)
        return outputs

    def _run_to_end(
        self,
        requests: Sequence[Sequence[RequestState]],
        take: Callable[[Delta], bool],
        use_tqdm: bool,
    ) -> None:
        """Queue requests and step until all have ended.

        Args:
            take: gets each sample's one Delta; returns whether its request has ended.

        Raises:
            RuntimeError: the model failed on one of them.
        """
        engine = self._engine
        for samples in requests:
            engine.submit(samples)
        num_unfinished = sum(map(len, requests))
        with tqdm(total=len(requests), desc="requests", disable=not use_tqdm) as progress:
            while num_unfinished:
                engine.step()
                for delta in engine.core.outbox.drain():
                    if delta.finish_reason == "error":
                        raise RuntimeError(f"request {delta.request_id} failed; see the log")
                    num_unfinished -= 1
                    if take(delta):
                        progress.update()

    def _alone(self, work: Callable[[], T]) -> T:
        """Run ``work`` while no other call does, on an engine that is empty before and after.

        Raises:
            RuntimeError: in a forked child, or from within another call on the same thread.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("an LLM does not work in a forked child: make one there")
        if self._owner == threading.get_ident():
            raise RuntimeError("this LLM is at work on this thread already")
        with self._lock:
            # An interrupt may come here too: the next call cleans up what this one cannot.
            try:
                self._owner = threading.get_ident()
                if not self._is_clean:
                    self._engine.abandon()
                self._is_clean = False
                result = work()
                self._is_clean = True
                return result
            finally:
                self._owner = None
                if not self._is_clean:
                    self._engine.abandon()
                    self._is_clean = True


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of them; an empty list is none."""
    single = isinstance(prompts, str | Mapping) or (
        len(prompts) > 0 and all(is_token_id(p) for p in prompts)
    )
    return [prompts] if single else list(prompts)  # type: ignore[arg-type,list-item]
