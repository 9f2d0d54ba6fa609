"""Prompts as programs give them: text, token ids, or a dict of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo._core import TokenIds
from octavo.engine.limits import truncate
from octavo.errors import InvalidParameterError, UnsupportedParameterError

if TYPE_CHECKING:
    from octavo._core import Tokenizer
    from octavo.pooling_params import PoolingParams
    from octavo.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]

_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt", "type"})


def prompt_salt(prompt: Prompt) -> str | None:
    """The salt a prompt brings: prefixes are shared only among requests of one salt.

    Raises:
        InvalidParameterError: it is no text, or empty.
    """
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidParameterError("cache_salt must be a non-empty string", "cache_salt")
    return salt


def prompt_parts(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """A prompt's (text, token ids); one of the two is None.

    Raises:
        InvalidParameterError: neither text nor token ids.
        UnsupportedParameterError: a key that would change the answer and is not known here.
    """
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        for key, value in prompt.items():
            # An empty mapping, as of images, asks for nothing.
            is_nothing = value is None or (isinstance(value, Mapping) and not value)
            if not is_nothing and key not in _PROMPT_KEYS:
                raise UnsupportedParameterError(f"a prompt's {key} is not supported", str(key))
        if (ids := prompt.get("prompt_token_ids")) is not None:
            return prompt.get("prompt"), ids
        if isinstance(text := prompt.get("prompt"), str):
            return text, None
    elif hasattr(prompt, "__len__") and (len(prompt) == 0 or is_token_id(prompt[0])):
        return None, prompt  # all of them are checked where they become TokenIds
    raise InvalidParameterError("prompt must be a string or a list of token ids", "prompt")


def is_token_id(value: object) -> bool:
    """True if a value is an integer, Python's or numpy's."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def checked_ids(token_ids: Sequence[int]) -> TokenIds:
    """The token ids of a prompt that was given as such.

    Raises:
        InvalidParameterError: one of them is not a token id.
    """
    try:
        return TokenIds(token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"prompt must hold token ids: {error}", "prompt") from None


def tokenization(
    given: Mapping[str, Any] | None, params: SamplingParams | PoolingParams
) -> tuple[bool, int | None]:
    """vLLM's ``tokenization_kwargs``: add_special_tokens, and the tokens to keep (None: all).

    Raises:
        UnsupportedParameterError: one that octavo has no use for.
    """
    options = dict(given or {})
    add_special_tokens = options.pop("add_special_tokens", None)
    most = options.pop("truncate_prompt_tokens", None)
    for name, value in options.items():
        if value is not None:
            raise UnsupportedParameterError(
                f"tokenization_kwargs[{name!r}] is not supported", "tokenization_kwargs"
            )
    if most is not None and (type(most) is not int or most == 0 or most < -1):
        raise InvalidParameterError(
            "truncate_prompt_tokens must be -1 or positive", "truncate_prompt_tokens"
        )
    return add_special_tokens is not False, params.truncate_prompt_tokens if most is None else most


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    max_model_len: int,
    params: SamplingParams,
    tokenization_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str | None, TokenIds]:
    """A prompt's text, None where it came as token ids, and its token ids.

    Raises:
        InvalidParameterError, UnsupportedParameterError: it is no prompt.
    """
    add_special_tokens, most = tokenization(tokenization_kwargs, params)
    text, given_ids = prompt_parts(prompt)
    if given_ids is None:
        assert text is not None
        token_ids = tokenizer.encode_ids(text, add_special_tokens)
    else:
        token_ids = checked_ids(given_ids)
    return text, truncate(token_ids, most, max_model_len)


def refuse_adapter(lora_request: object) -> None:
    """Raises UnsupportedParameterError for anything but None."""
    if lora_request is not None:
        raise UnsupportedParameterError("octavo has no LoRA yet", "lora_request")
