"""POST /v1/completions: the completion dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from octavo.engine.limits import truncate
from octavo.server.openai.dialect import OpenAiDialect, OpenAiReply
from octavo.server.openai.logprobs import CompletionLogprobs, prompt_logprobs
from octavo.server.openai.protocol import CompletionRequest, parse_completion
from octavo.server.work.answer import answer
from octavo.server.work.prompts import INLINE_CHARS, encode_prompts

if TYPE_CHECKING:
    from octavo._core import TokenIds
    from octavo.server.http.exchange import Exchange
    from octavo.server.http.fields import Prompt
    from octavo.server.work.dialect import Dialect
    from octavo.server.work.news import News
    from octavo.server.work.served_model import ServedModel
    from octavo.server.work.state import ServerState


class CompletionDialect(OpenAiDialect):
    """Prompts in, their continuations out."""

    def parse(self, body: Mapping[str, Any]) -> CompletionRequest:
        """See ``parse_completion``."""
        return parse_completion(body)

    async def reply(
        self, request: CompletionRequest, model: ServedModel, request_id: str
    ) -> CompletionReply:
        """Encode the prompts, and decode them again where they are echoed.

        Raises:
            InvalidRequestError: a prompt is longer than any that fits.
        """
        engine = model.engine
        add_special_tokens = request.add_special_tokens is not False
        encoded = await encode_prompts(engine, request.prompts, add_special_tokens)
        prompts = [
            truncate(
                prompt,
                request.truncate_prompt_tokens,
                engine.max_model_len,
                request.truncation_side,
            )
            for prompt in encoded
        ]
        echoes = [""] * len(prompts)
        if request.echo:
            is_cut = [len(a) < len(b) for a, b in zip(prompts, encoded, strict=True)]
            echoes = await _echoes(model, request.prompts, prompts, is_cut)
        return CompletionReply(request, model, request_id, prompts, echoes)


class CompletionReply(OpenAiReply):
    """Plain text. ``echoes``: what each prompt's choices begin with."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    id_prefix = "cmpl"
    prompt_field = "prompt"

    def __init__(
        self,
        request: CompletionRequest,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[TokenIds],
        echoes: Sequence[str],
    ) -> None:
        super().__init__(request, model, request_id, prompts)
        self._echoes = echoes
        # The prompt's tokens are reported as part of the text.
        self._echoes_logprobs = request.echo and request.sampling.get("logprobs") is not None
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def start(self, index: int) -> bytes:
        echo = self._echo(index)
        if not echo and not self.request.return_token_ids:
            return b""
        choice = self.text_choice(index, echo, None, None)
        if self._echoes_logprobs:
            choice["logprobs"] = self._prompt_arrays(index)
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompt(index))
        return self.chunk_event([choice], **self.first_usage(index))

    def text_choice(
        self, index: int, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def decorate(self, choice: dict[str, Any], index: int, news: News) -> None:
        if news.logprobs is not None:
            choice["logprobs"] = self._writer(index).push(news.logprobs)
        if self.request.return_token_ids:
            choice["token_ids"] = news.token_ids

    def whole_choice(self, index: int, news: News) -> dict[str, Any]:
        text = self._echo(index) + news.text
        choice = self.text_choice(index, text, news.finish_reason, news.stop_reason)
        self.decorate(choice, index, news)
        if self._echoes_logprobs:
            prompt, output = self._prompt_arrays(index), choice["logprobs"]
            choice["logprobs"] = {key: prompt[key] + output[key] for key in prompt}
        # As in vLLM, whose clients read them unasked, these keys are always there.
        choice["prompt_logprobs"] = choice["prompt_token_ids"] = None
        choice.setdefault("token_ids", None)
        if self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.scores[index // self.request.n], self._texts, self.request.prompt_logprobs
            )
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompt(index))
        return choice

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.request.n]

    def _prompt(self, index: int) -> TokenIds:
        return self.prompts[index // self.request.n]

    def _writer(self, index: int) -> CompletionLogprobs:
        writer = self._logprobs.get(index)
        if writer is None:
            writer = self._logprobs[index] = CompletionLogprobs(
                self._texts,
                self.request.sampling["logprobs"],
                bool(self.request.return_tokens_as_token_ids),
                self.request.sampling.get("skip_special_tokens", True),
                self._echo(index),
                len(self.request.sampling.get("logprob_token_ids", ())),
            )
        return writer

    def _prompt_arrays(self, index: int) -> dict[str, Any]:
        scores = self.scores[index // self.request.n]
        return self._writer(index).prompt(self._prompt(index), scores)


async def _echoes(
    model: ServedModel,
    given: Sequence[Prompt],
    prompts: Sequence[TokenIds],
    is_cut: Sequence[bool],
) -> list[str]:
    """The prompts' texts: the client's own where it sent text and none of it was cut off.

    Special tokens are spelled out in either: they are the prompt's, whatever the answer skips.
    """
    tokenizer = model.engine.tokenizer

    def decode() -> list[str]:
        return [
            one if isinstance(one, str) and not cut else tokenizer.decode(prompt, False)
            for one, prompt, cut in zip(given, prompts, is_cut, strict=True)
        ]

    if sum(map(len, prompts)) <= INLINE_CHARS:
        return decode()
    return await asyncio.to_thread(decode)


COMPLETIONS: Final[Dialect[CompletionRequest]] = CompletionDialect()


async def completions(state: ServerState, exchange: Exchange) -> None:
    """Complete every prompt, ``n`` times."""
    await answer(COMPLETIONS, state, exchange)
