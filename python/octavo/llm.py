"""LLM: the offline API. The caller's thread steps the engine; there is no server and no loop."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from octavo.config import EngineConfig
from octavo.engine.engine import Prompt, make_scores, prompt_parts
from octavo.engine.engine_loop import EngineLoop
from octavo.engine.request import EngineRequest
from octavo.engine.trace import StepTrace
from octavo.errors import RequestTooLongError
from octavo.models.loader import resolve_model
from octavo.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)
from octavo.runner.embedding_runner import EmbeddingRunner, is_encoder
from octavo.sampling_params import InvalidParameterError, SamplingParams
from octavo.server.chat_template import ChatTemplate

if TYPE_CHECKING:
    from octavo._core import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model in this process.

    Args:
        model: folder, .gguf file or hub id; None is SmolLM2-135M-Instruct.
        config: further fields of EngineConfig.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **config: Any) -> None:
        self.config = EngineConfig(model=model, **config)
        self._source = resolve_model(self.config)
        self._embedder: EmbeddingRunner | None = None
        self._loop: EngineLoop | None = None
        if is_encoder(self._source):
            self._embedder = EmbeddingRunner(self.config, self._source)
        else:
            self._loop = EngineLoop(self.config, source=self._source)
        self._next_id = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._source.tokenizer

    @property
    def _engine(self) -> EngineLoop:
        if self._loop is None:
            raise ValueError("this model embeds texts and generates none: use embed")
        return self._loop

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
        single = isinstance(prompts, str | Mapping) or all(isinstance(p, int) for p in prompts)
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[arg-type,list-item]
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

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector a text, in the prompts' order, by an encoder.

        Args:
            prompts: one prompt or several: text, token ids, or ``{"prompt_token_ids": [...]}``.
            truncate_prompt_tokens: cut texts to so many tokens, special ones included; -1 is the
                model's limit. None refuses what is longer than that. Token ids are cut at the end.

        Raises:
            ValueError: the model is no encoder.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        runner = self._embedder
        if runner is None:
            raise ValueError("this model generates text: embed needs an encoder")
        most = runner.max_len if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        if most is not None and not 1 <= most <= runner.max_len:
            raise InvalidParameterError(
                f"truncate_prompt_tokens must be -1 or in [1, {runner.max_len}], not {most}",
                "truncate_prompt_tokens",
            )
        single = isinstance(prompts, str | Mapping) or (
            bool(prompts) and all(isinstance(p, int) for p in prompts)
        )
        batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[arg-type,list-item]
        outputs = [self._embedding_request(prompt, most) for prompt in batch]
        if outputs:
            with tqdm(total=len(outputs), desc="texts", disable=not use_tqdm) as progress:
                texts = [output.prompt_token_ids for output in outputs]
                rows = runner.embed(texts, progress.update)
            for output, row in zip(outputs, rows.tolist(), strict=True):
                output.outputs.embedding = row
        return outputs

    def _embedding_request(self, prompt: Prompt, most: int | None) -> EmbeddingRequestOutput:
        """A checked text without its vector yet."""
        runner = self._embedder
        assert runner is not None
        text, given = prompt_parts(prompt)
        if given is not None:
            token_ids = list(given)[:most]
        else:
            assert text is not None
            token_ids = self._source.tokenizer.encode(text)
            if most is not None and len(token_ids) > most:
                token_ids = self._cut(text, token_ids, most)
        if not token_ids:
            raise InvalidParameterError("prompt must hold at least one token", "prompt")
        if len(token_ids) > runner.max_len:
            raise RequestTooLongError(len(token_ids), runner.max_len)
        if min(token_ids) < 0 or max(token_ids) >= runner.vocab_size:
            raise InvalidParameterError(
                f"prompt token ids must be in [0, {runner.vocab_size})", "prompt"
            )
        request_id = str(next(self._next_id))
        return EmbeddingRequestOutput(request_id, text, token_ids, EmbeddingOutput([]))

    def _cut(self, text: str, token_ids: list[int], most: int) -> list[int]:
        """The text's first tokens between its special ones, ``most`` in all."""
        plain = self._source.tokenizer.encode(text, False)
        num_special = len(token_ids) - len(plain)
        first = next(i for i in range(num_special + 1) if token_ids[i : i + len(plain)] == plain)
        num_after = num_special - first
        if most <= num_special:
            raise InvalidParameterError(
                f"truncate_prompt_tokens must leave room for {num_special} special tokens",
                "truncate_prompt_tokens",
            )
        return token_ids[: most - num_after] + token_ids[len(token_ids) - num_after :]

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
        requests: list[EngineRequest] = []
        outputs: dict[int, RequestOutput] = {}
        for prompt, sampling in zip(prompts, params, strict=True):
            text, token_ids = prompt_parts(prompt)
            if token_ids is None:
                assert text is not None
                token_ids = self._engine.tokenizer.encode(text)
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
                    prompt_logprobs=output.scores,
                )
            )
        for request in requests:
            self._engine.submit(request)
        return outputs

    def _run_to_end(self, outputs: Mapping[int, RequestOutput], use_tqdm: bool) -> None:
        engine = self._engine
        unfinished = set(outputs)
        progress = tqdm(
            total=len({id(o) for o in outputs.values()}), desc="requests", disable=not use_tqdm
        )
        try:
            while unfinished:
                engine.step()
                for delta in engine.core.outbox.drain():
                    output = outputs[delta.request_id]
                    index = delta.request_id - int(output.request_id)
                    output.apply(index, delta, engine.tokenizer)
                    if delta.finish_reason == "error":
                        raise RuntimeError(f"request {output.request_id} failed; see the log")
                    if delta.finish_reason is not None:
                        unfinished.discard(delta.request_id)
                        engine.requests.pop(delta.request_id, None)
                    if output.finished:
                        progress.update()
        finally:
            progress.close()
            if unfinished:
                # Interrupted: leave an engine that can be used again.
                engine.abort(unfinished)
                while engine.core.has_work():
                    engine.step()
                engine.core.outbox.drain()
                for request_id in unfinished:
                    engine.requests.pop(request_id, None)
