"""Limits on one request, checked before anything is allocated on its behalf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Final

from octavo.errors import BadRequestError, BodyTooLargeError, InvalidParameterError

# The one table of the wire; text/chat_template.py has the templates'. Each number is far above
# honest use and far below what harms the server.
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEADER_BYTES: Final = 16 * 1024
MAX_PROMPTS: Final = 1024
MAX_N: Final = 128
# OpenAI's; each of them is one request to the scheduler.
MAX_EMBEDDING_INPUTS: Final = 2048
# One request may not fill the queue alone: OpenAI's largest batch of prompts, four samples each.
MAX_SAMPLES: Final = 4096
MAX_MESSAGES: Final = 16 * 1024
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_CHARS: Final = 256
MAX_LOGIT_BIAS: Final = 1024
MAX_ALLOWED_TOKEN_IDS: Final = 4096
# More than any vocabulary: -1 in a request.
ALL_LOGPROBS: Final = 2**31 - 1
MAX_REQUEST_ID_CHARS: Final = 256
MAX_CACHE_SALT_CHARS: Final = 1024
# Of a large body. Parsing holds the interpreter's lock, at about a microsecond a node and a tenth
# of that an element: what could hold it for seconds is refused first (tests/server/test_large.py).
# Nodes are objects, arrays and members: 16,384 messages of many parts have fewer.
MAX_JSON_NODES: Final = 1 << 18
# As many token ids as 1,024 prompts of 4,096.
MAX_JSON_ELEMENTS: Final = 1 << 22
# A client that stops in the middle of its body holds memory and a connection; so does one that
# sends a byte now and then.
MAX_BODY_SILENCE_S: Final = 60.0
MAX_BODY_S: Final = 600.0
# A head comes in one piece, nearly always at once.
MAX_HEAD_S: Final = 30.0
# A client that reads nothing of what waits for it holds its answer's memory, and its samples.
MAX_UNREAD_S: Final = 120.0


def check_body_size(num_bytes: int) -> None:
    """Raises BodyTooLargeError over MAX_BODY_BYTES."""
    if num_bytes > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"the request body is larger than {MAX_BODY_BYTES} bytes")


def check_json_size(num_nodes: int, num_commas: int) -> None:
    """Raises BadRequestError for a body of more values than any request needs."""
    if num_nodes > MAX_JSON_NODES:
        raise BadRequestError(
            f"the request body holds more than {MAX_JSON_NODES} objects, lists and fields"
        )
    if num_commas > MAX_JSON_ELEMENTS:
        raise BadRequestError(f"the request body holds more than {MAX_JSON_ELEMENTS} values")


def check_count(param: str, items: Sized, most: int, what: str = "entries") -> None:
    """Raises InvalidParameterError if there are more than ``most``."""
    if len(items) > most:
        raise InvalidParameterError(
            f"{param} must have at most {most} {what}, not {len(items)}", param
        )


def check_prompts(param: str, prompts: Sequence[object]) -> None:
    """At least one prompt, at most MAX_PROMPTS."""
    if not prompts:
        raise InvalidParameterError(f"{param} must not be empty", param)
    check_count(param, prompts, MAX_PROMPTS, "prompts")


def check_samples(num_prompts: int, n: int) -> None:
    """``n`` samples of each prompt: the product is what the engine has to hold."""
    if n > MAX_N:
        raise InvalidParameterError(f"n must be at most {MAX_N}, not {n}", "n")
    if num_prompts * n > MAX_SAMPLES:
        raise InvalidParameterError(
            f"{num_prompts} prompts of {n} samples each are more than {MAX_SAMPLES}", "n"
        )


def check_strings(param: str, strings: Sequence[str], most: int, most_chars: int) -> None:
    """A bounded number of strings of bounded length, none of them empty."""
    check_count(param, strings, most, "strings")
    for string in strings:
        if not string:
            raise InvalidParameterError(f"{param} must not hold empty strings", param)
        if len(string) > most_chars:
            raise InvalidParameterError(
                f"{param} must hold strings of at most {most_chars} characters", param
            )


def check_stop(stop: Sequence[str]) -> None:
    """Stop strings: each one is searched for in every step of the request."""
    check_strings("stop", stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)


def check_bad_words(words: Sequence[str]) -> None:
    """Bad words: each becomes token sequences that the sampler bans."""
    check_strings("bad_words", words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)


def check_logit_bias(bias: Mapping[int, float]) -> None:
    """Biases in OpenAI's range."""
    for token_id, value in bias.items():
        if not -100 <= value <= 100:
            raise InvalidParameterError(
                f"logit_bias must hold values between -100 and 100, not {value} for {token_id}",
                "logit_bias",
            )


def check_logprobs(param: str, num_logprobs: int, max_logprobs: int, vocab_size: int) -> None:
    """``max_logprobs``: the most that the operator allows; -1 is no limit."""
    asks_for_all = num_logprobs == ALL_LOGPROBS
    if max_logprobs != -1 and (vocab_size if asks_for_all else num_logprobs) > max_logprobs:
        asked = "-1 (all)" if asks_for_all else num_logprobs
        raise InvalidParameterError(
            f"{param} must be between 0 and {max_logprobs}, not {asked}", param
        )
