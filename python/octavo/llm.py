"""LLM: the offline API. The caller's thread steps the engine; there is no server and no loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from octavo.beam_search import BeamSearchOutput, BeamSearchParams, search
from octavo.config import EngineConfig
from octavo.engine.engine import Prompt, checked_ids, make_scores, prompt_parts, prompt_salt
from octavo.engine.engine_loop import EngineLoop
from octavo.engine.request import EngineRequest
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
)
from octavo.pooling import (
    NO_TOKENS,
    PooledText,
    PoolingInfo,
    cosine,
    encode_pair,
    encode_text,
    max_text_len,
    probabilities,
    squash,
    vector,
)
from octavo.sampling_params import SamplingParams
from octavo.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from octavo._core import Delta, Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model in this process.

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
        self._next_id = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for."""
        return SamplingParams(**self._engine.source.generation_defaults)

    @contextlib.contextmanager
    def trace(self, file: str | Path) -> Iterator[StepTrace]:
        """Trace the steps of the block; then write them to a file that Perfetto shows."""
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
        outputs = self._submit(batch, params)
        self._run_to_end(outputs, use_tqdm)
        return list({id(output): output for output in outputs.values()}.values())

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role", "content"}``.

        Raises:
            ValueError: the model has no chat template and none is given.
        """
        source = chat_template or self._engine.source.chat_template
        if source is None:
            raise ValueError("the model has no chat template: pass chat_template")
        template = ChatTemplate(source, self._engine.source.special_tokens)
        conversations: Iterable[Any] = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        tokenizer = self._engine.tokenizer
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = template.render(
                list(conversation),
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            # The template has written the special tokens already.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

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
        """One vector a text, in the prompts' order.

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
        for request_id, text, token_ids, pooled in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            output = EmbeddingOutput(vector(pooled).tolist())
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
        for request_id, _, token_ids, pooled in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            output = ClassificationOutput(probabilities(pooled, info.activation))
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
        """What ``embed`` or ``classify`` gives, as one tensor a text.

        Args:
            prompts, truncate_prompt_tokens: as for ``embed``.
            pooling_task: "embed" or "classify"; None is what the model does.

        Raises:
            ValueError: the model does not do that; outputs of single tokens are not to be had.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        if pooling_task not in (None, "embed", "classify"):
            raise ValueError(f"pooling_task must be embed or classify, not {pooling_task!r}")
        wanted = {"embed": ("embed",), "classify": ("classify", "score")}.get(
            pooling_task or "", ("embed", "classify", "score")
        )
        info = self._pooling_info(*wanted)
        outputs = []
        for request_id, _, token_ids, pooled in self._pool_each(
            prompts, truncate_prompt_tokens, use_tqdm
        ):
            if info.task == "embed":
                data = torch.from_numpy(vector(pooled))
            else:
                data = torch.tensor(probabilities(pooled, info.activation))
            outputs.append(PoolingRequestOutput(request_id, token_ids, PoolingOutput(data)))
        return outputs

    def _pool_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        truncate_prompt_tokens: int | None,
        use_tqdm: bool,
    ) -> list[tuple[str, str | None, list[int], PooledText]]:
        """Each prompt's (request id, text, token ids, what came of it)."""
        most = max_text_len(truncate_prompt_tokens, self._engine.limits.max_model_len)
        parts = [prompt_parts(prompt) for prompt in as_batch(prompts)]
        tokenizer = self._engine.tokenizer
        # All at once: on several cores, and faster on one.
        encoded = iter(tokenizer.encode_batch([text or "" for text, ids in parts if ids is None]))
        texts: list[tuple[Sequence[int], PooledText]] = []
        for text, token_ids in parts:
            if token_ids is None:
                assert text is not None
                token_ids = next(encoded)
                if most is not None and len(token_ids) > most:
                    token_ids = encode_text(tokenizer, text, most)
            elif most is not None:
                token_ids = token_ids[:most]
            texts.append((token_ids, PooledText()))
        ids = self._pool(texts, use_tqdm)
        return [
            (str(request_id), text, list(token_ids), pooled)
            for request_id, (text, _), (token_ids, pooled) in zip(ids, parts, texts, strict=True)
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
        """How well each text of ``text_2`` fits its partner in ``text_1``, or the only one there.

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
            ids = self._pool(pairs, use_tqdm)
            scores = [squash(pooled, info.squashes and use_activation) for _, pooled in pairs]
            token_ids = [pair_ids for pair_ids, _ in pairs]
        else:
            # A text that is paired several times is computed once.
            texts = {
                text: (encode_text(tokenizer, text, most), PooledText())
                for text in dict.fromkeys([*firsts, *seconds])
            }
            done = dict(zip(texts, self._pool(list(texts.values()), use_tqdm), strict=True))
            ids = [done[second] for second in seconds]
            couples = [(texts[a], texts[b]) for a, b in zip(firsts, seconds, strict=True)]
            scores = [cosine(a[1], b[1]) for a, b in couples]
            token_ids = [a[0] + b[0] for a, b in couples]
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

    def _pool(self, texts: Sequence[tuple[Sequence[int], PooledText]], use_tqdm: bool) -> list[int]:
        """Check all, then run all; their request ids."""
        prompts = [checked_ids(token_ids) for token_ids, _ in texts]
        check = self._engine.limits.check
        for token_ids in prompts:
            check(token_ids, NO_TOKENS)
        first, now_s = next(self._next_id), time.monotonic()
        self._next_id = itertools.count(first + len(texts))
        ids = range(first, first + len(texts))
        for request_id, token_ids, (_, pooled) in zip(ids, prompts, texts, strict=True):
            self._engine.submit(
                EngineRequest(
                    request_ids=range(request_id, request_id + 1),
                    prompt_token_ids=token_ids,
                    params=NO_TOKENS,
                    max_tokens=0,
                    arrival_s=now_s,
                    pooled=pooled,
                )
            )
        with (
            tqdm(total=len(texts), desc="requests", disable=not use_tqdm) as progress,
            contextlib.closing(self._deltas(set(ids))) as deltas,
        ):
            for _ in deltas:
                progress.update()
        return list(ids)

    def _per_prompt(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise ValueError(f"{len(sampling_params)} sampling params for {num_prompts} prompts")
        return list(sampling_params)

    def _submit(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> dict[int, RequestOutput]:
        """Check all, then queue all: a bad prompt must not leave its neighbours running."""
        if (info := self._engine.runner.pooling) is not None:
            raise ValueError(f"this model generates no text: use {info.task}")
        requests: list[EngineRequest] = []
        outputs: dict[int, RequestOutput] = {}
        for prompt, sampling in zip(prompts, params, strict=True):
            text, given_ids = prompt_parts(prompt)
            if given_ids is None:
                assert text is not None
                token_ids = self._engine.tokenizer.encode_ids(text)
            else:
                token_ids = checked_ids(given_ids)
            sampling = self._engine.limits.resolve(sampling)
            max_tokens = self._engine.limits.check(token_ids, sampling)
            ids = [next(self._next_id) for _ in range(sampling.n)]
            output = RequestOutput(
                request_id=str(ids[0]),
                prompt=text,
                prompt_token_ids=list(token_ids),
                outputs=[CompletionOutput(index) for index in range(sampling.n)],
                scores=make_scores(sampling),
            )
            outputs.update(dict.fromkeys(ids, output))
            requests.append(
                EngineRequest(
                    request_ids=range(ids[0], ids[0] + sampling.n),
                    prompt_token_ids=token_ids,
                    params=sampling,
                    max_tokens=max_tokens,
                    arrival_s=time.monotonic(),
                    cache_salt=prompt_salt(prompt),
                    prompt_logprobs=output.scores,
                )
            )
        for request in requests:
            self._engine.submit(request)
        return outputs

    def _run_to_end(self, outputs: Mapping[int, RequestOutput], use_tqdm: bool) -> None:
        total = len({id(output) for output in outputs.values()})
        with (
            tqdm(total=total, desc="requests", disable=not use_tqdm) as progress,
            contextlib.closing(self._deltas(set(outputs))) as deltas,
        ):
            for delta in deltas:
                output = outputs[delta.request_id]
                output.apply(
                    delta.request_id - int(output.request_id), delta, self._engine.tokenizer
                )
                if output.finished:
                    progress.update()

    def _deltas(self, unfinished: set[int]) -> Generator[Delta]:
        """Step until these samples have ended; their news.

        Raises:
            RuntimeError: one of them has failed.
        """
        engine = self._engine
        try:
            while unfinished:
                engine.step()
                for delta in engine.core.outbox.drain():
                    reason = delta.finish_reason
                    if reason is not None:
                        unfinished.discard(delta.request_id)
                        engine.requests.pop(delta.request_id, None)
                        if reason == "error":
                            raise RuntimeError(f"request {delta.request_id} failed; see the log")
                    yield delta
        finally:
            if unfinished:
                # Interrupted: leave an engine that can be used again.
                engine.abort(unfinished)
                while engine.core.has_work():
                    engine.step()
                engine.core.outbox.drain()
                for request_id in unfinished:
                    engine.requests.pop(request_id, None)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of them; an empty list is none."""
    single = isinstance(prompts, str | Mapping) or (
        bool(prompts) and all(isinstance(p, int) for p in prompts)
    )
    return [prompts] if single else list(prompts)  # type: ignore[arg-type,list-item]
