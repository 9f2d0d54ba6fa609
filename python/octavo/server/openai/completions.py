"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from octavo.errors import RequestTooLongError
from octavo.server.openai.logprobs import CompletionLogprobs, prompt_logprobs
from octavo.server.openai.protocol import CompletionRequest, parse_completion
from octavo.server.work.answer import answer
from octavo.server.work.prompts import INLINE_CHARS, encode_prompts, truncate
from octavo.server.work.usage import Usage
from octavo.server.work.wire import DONE, Wire, sse_event

if TYPE_CHECKING:
    from octavo._core import Delta, TokenIds
    from octavo.server.http.exchange import Exchange
    from octavo.server.work.state import ServerState


class CompletionWire(Wire):
    """Plain text. Choice ``p * n + i`` is sample i of prompt p.

    ``echoes``: what each prompt's choices begin with.
    """

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    id_prefix = "cmpl"
    prompt_field = "prompt"

    def __init__(
        self,
        state: ServerState,
        request: CompletionRequest,
        model: str,
        request_id: str,
        prompts: list[TokenIds],
        echoes: list[str],
    ) -> None:
        super().__init__(state, request, model, request_id)
        self._prompts = prompts
        self._echoes = echoes
        self._is_echo = request.echo
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def echo(self, index: int) -> str:
        """What the choice's text begins with."""
        return self._echoes[index // self.request.n]

    def first_event(self, index: int) -> bytes:
        echo = self.echo(index)
        if not echo and not self.request.return_token_ids:
            return b""
        choice = self.text_choice(index, echo, None, None)
        if self._echoes_logprobs:
            choice["logprobs"] = self._prompt_arrays(index)
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompts[index // self.request.n])
        return sse_event(self.chunk([choice]))

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

    def decorate_choice(self, choice: dict[str, Any], index: int, delta: Delta) -> None:
        if delta.logprobs is not None:
            choice["logprobs"] = self._writer(index).push(delta.logprobs)
        if self.request.return_token_ids:
            choice["token_ids"] = delta.token_ids

    def final_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        text = self.echo(index) + delta.text
        choice = self.text_choice(index, text, delta.finish_reason, delta.stop_reason)
        self.decorate_choice(choice, index, delta)
        if self._echoes_logprobs:
            prompt, output = self._prompt_arrays(index), choice["logprobs"]
            choice["logprobs"] = {key: prompt[key] + output[key] for key in prompt}
        if self.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self.scores[index // self.request.n],
                self.state.token_texts,
                self.request.prompt_logprobs,
            )
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompts[index // self.request.n])
        return choice

    @property
    def _echoes_logprobs(self) -> bool:
        """Whether the prompt's tokens are reported as part of the text."""
        return self._is_echo and self.request.sampling.get("logprobs") is not None

    def _writer(self, index: int) -> CompletionLogprobs:
        writer = self._logprobs.get(index)
        if writer is None:
            writer = self._logprobs[index] = CompletionLogprobs(
                self.state.token_texts,
                self.request.sampling["logprobs"],
                self.request.return_tokens_as_token_ids,
                self.request.sampling.get("skip_special_tokens", True),
                len(self.echo(index)),
            )
        return writer

    def _prompt_arrays(self, index: int) -> dict[str, Any]:
        prompt = index // self.request.n
        return self._writer(index).prompt(self._prompts[prompt], self.scores[prompt])

    def echo_choice(self, index: int) -> dict[str, Any]:
        """The choice of a request for no tokens at all."""
        choice = self.text_choice(index, self.echo(index), "length", None)
        if self.request.return_token_ids:
            choice["token_ids"] = []
            choice["prompt_token_ids"] = list(self._prompts[index // self.request.n])
        return choice


async def completions(state: ServerState, exchange: Exchange) -> None:
    """Complete every prompt, ``n`` times."""
    engine = state.engine_for_work()
    request = parse_completion(await exchange.read_json(), engine.config.max_logprobs)
    model = state.model_name(request.model)
    params = request.sampling_params(engine.generation_defaults)
    add_special_tokens = request.add_special_tokens is not False
    prompts = [
        truncate(prompt, request.truncate_prompt_tokens, engine.max_model_len)
        for prompt in await encode_prompts(engine, request.prompts, add_special_tokens)
    ]
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = await _echoes(state, request, prompts)
    wire = CompletionWire(state, request, model, exchange.request_id, prompts, echoes)
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        await _answer_echo(state, exchange, wire, prompts)
    else:
        await answer(state, exchange, wire, prompts, params)


async def _echoes(
    state: ServerState, request: CompletionRequest, prompts: list[TokenIds]
) -> list[str]:
    """The prompts' texts: the client's own where it sent text and none of it was cut off."""
    tokenizer = state.engine.tokenizer

    def decode() -> list[str]:
        return [
            given
            if isinstance(given, str) and request.truncate_prompt_tokens is None
            else tokenizer.decode(prompt, request.sampling.get("skip_special_tokens", True))
            for given, prompt in zip(request.prompts, prompts, strict=True)
        ]

    if sum(map(len, prompts)) <= INLINE_CHARS:
        return decode()
    return await asyncio.to_thread(decode)


async def _answer_echo(
    state: ServerState, exchange: Exchange, wire: CompletionWire, prompts: list[TokenIds]
) -> None:
    """``max_tokens: 0``: the prompt is the answer, and nobody asks how likely it was."""
    n = wire.request.n
    usage = Usage(n)
    for number, prompt in enumerate(prompts):
        if len(prompt) > state.engine.max_model_len:
            raise RequestTooLongError(len(prompt), state.engine.max_model_len, "prompt")
        usage.add_prompt(number, len(prompt))
    choices = [wire.echo_choice(index) for index in range(len(prompts) * n)]
    if wire.request.stream:
        events = [sse_event(wire.chunk([choice])) for choice in choices]
        if wire.request.include_usage:
            events.append(wire.usage_event(usage))
        await exchange.start_stream()
        await exchange.end_stream(b"".join(events) + DONE)
    else:
        await exchange.respond_json({**wire.envelope(choices), "usage": usage.to_object()})
