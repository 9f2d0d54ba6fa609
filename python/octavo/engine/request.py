"""EngineRequest: one validated request on its way to the engine thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from octavo.errors import InvalidParameterError, RequestTooLongError

if TYPE_CHECKING:
    from octavo._core import SseTemplate, TokenIds, Tokenizer
    from octavo.pooling import PooledText
    from octavo.prompt_logprobs import PromptLogprobs
    from octavo.sampling_params import SamplingParams

Delivery = Literal["sse", "delta", "final"]


@dataclass(slots=True, kw_only=True)
class EngineRequest:
    """A prompt, how to sample from it, and how to deliver what it says.

    ``request_ids``: one per sample, consecutive. ``max_tokens`` is resolved: it always fits the
    context. ``prompt_logprobs``, ``pooled``: to be filled. Built by ``check``; nothing
    downstream needs to validate again.
    """

    request_ids: range
    prompt_token_ids: TokenIds
    params: SamplingParams
    max_tokens: int
    arrival_s: float
    delivery: Delivery = "final"
    sse: Sequence[SseTemplate] | None = None
    priority: int = 0
    cache_salt: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    pooled: PooledText | None = None


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the loaded model can take; checked before anything is allocated for a request."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    tokenizer: Tokenizer

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """The parameters with as many logprobs as there are tokens in place of -1.

        Raises:
            InvalidParameterError: that is more than a request may ask for.
        """
        changes: dict[str, int] = {}
        for param in ("logprobs", "prompt_logprobs"):
            if getattr(params, param) == -1:
                changes[param] = self.vocab_size
        if not changes:
            return params
        if 0 <= self.max_logprobs < self.vocab_size:
            param = next(iter(changes))
            raise InvalidParameterError(
                f"{param} must be at most {self.max_logprobs}, not -1 (all)", param
            )
        return dataclasses.replace(params, **changes)  # type: ignore[arg-type]

    def check(self, prompt_token_ids: TokenIds, params: SamplingParams) -> int:
        """The number of tokens the request may generate; ``params`` are resolved.

        Raises:
            RequestTooLongError: the prompt leaves no room for one token.
            InvalidParameterError: a token id out of the vocabulary, or too many logprobs.
        """
        num_prompt_tokens = len(prompt_token_ids)
        if num_prompt_tokens == 0:
            raise InvalidParameterError("prompt must hold at least one token", "prompt")
        room = self.max_model_len - num_prompt_tokens
        wanted = room if params.max_tokens is None else params.max_tokens
        if room < min(wanted, 1) or (params.max_tokens is None and room < 1):
            raise RequestTooLongError(num_prompt_tokens, self.max_model_len)
        # Kernels index the embedding with these ids: one out of range reads foreign memory.
        if prompt_token_ids.max() >= self.vocab_size:
            raise InvalidParameterError(
                f"prompt token ids must be in [0, {self.vocab_size})", "prompt"
            )
        spaces = params.skip_special_tokens or params.spaces_between_special_tokens
        if not spaces and self.tokenizer.spaces_tokens:
            raise InvalidParameterError(
                "spaces_between_special_tokens: false is not supported by this model's tokenizer",
                "spaces_between_special_tokens",
            )
        most = self.vocab_size if self.max_logprobs == -1 else self.max_logprobs
        for param in ("logprobs", "prompt_logprobs"):
            value = getattr(params, param)
            if value is not None and value > most:
                raise InvalidParameterError(f"{param} must be at most {most}, not {value}", param)
        for param, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids),
            ("logit_bias", tuple(params.logit_bias)),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise InvalidParameterError(
                    f"{param} must hold token ids in [0, {self.vocab_size})", param
                )
        return min(wanted, room)
