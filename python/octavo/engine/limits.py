"""RequestLimits: what the loaded model can take of a request; prompts cut to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import InvalidParameterError, RequestTooLongError

if TYPE_CHECKING:
    from octavo._core import TokenIds, Tokenizer
    from octavo.sampling_params import SamplingParams

_INT64_MAX = 2**63 - 1
# Of wrong token ids: enough to see what went wrong.
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of the loaded model, checked before anything is allocated for a request."""

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
            raise InvalidParameterError(
                "the decoder prompt cannot be empty: it must hold at least one token", "prompt"
            )
        room = self.max_model_len - num_prompt_tokens
        wanted = room if params.max_tokens is None else params.max_tokens
        if room < min(wanted, 1) or (params.max_tokens is None and room < 1):
            raise RequestTooLongError(num_prompt_tokens, self.max_model_len)
        # Kernels index the embedding with these ids: one out of range reads foreign memory.
        if (largest := prompt_token_ids.max()) >= self.vocab_size:
            raise InvalidParameterError(
                f"token id {largest} of the prompt is out of vocabulary: ids must be in "
                f"[0, {self.vocab_size})",
                "prompt",
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
            ("logprob_token_ids", params.logprob_token_ids),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                wrong = [token for token in ids if not 0 <= token < self.vocab_size]
                more = ", ..." if len(wrong) > _MAX_NAMED else ""
                named = ", ".join(map(str, wrong[:_MAX_NAMED])) + more
                raise InvalidParameterError(
                    f"{param} must hold token ids in [0, {self.vocab_size}), not {named}", param
                )
        return min(wanted, room)

    def check_service(self, priority: int, cache_salt: str | None) -> None:
        """Check what a request asks of the scheduler and the prefix cache.

        Raises:
            InvalidParameterError: a value of another type, or one that is out of range.
        """
        if type(priority) is not int or not -_INT64_MAX - 1 <= priority <= _INT64_MAX:
            raise InvalidParameterError("priority must be an integer of 64 bits", "priority")
        if cache_salt is not None:
            try:
                cache_salt.encode()
            except (AttributeError, UnicodeEncodeError):
                raise InvalidParameterError(
                    "cache_salt must be a string of Unicode text", "cache_salt"
                ) from None


def truncate(
    token_ids: TokenIds, most: int | None, max_model_len: int, side: str | None = None
) -> TokenIds:
    """The last ``most`` ids; -1 is the whole context, None is no truncation.

    Args:
        side: the end that is cut: "left", as None is, or "right", which keeps the first ids.

    Raises:
        InvalidParameterError: ``most`` is over the context.
    """
    if most is None:
        return token_ids
    if most > max_model_len:
        raise InvalidParameterError(
            f"truncate_prompt_tokens must be at most {max_model_len}, not {most}",
            "truncate_prompt_tokens",
        )
    # One token of the context is the answer's.
    most = max_model_len - 1 if most == -1 else most
    return token_ids[:most] if side == "right" else token_ids[-most:]
