"""PooledText: a text on its way through a model that says nothing and gives a vector."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from octavo.errors import InvalidParameterError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo._core import Tokenizer

# What a model without generation is for: to embed texts, to score pairs (a classifier of one label,
# a cross-encoder), or to classify (one of several).
PoolingTask = Literal["embed", "score", "classify"]

# What turns a classifier's logits into what the caller sees.
Activation = Literal["identity", "sigmoid", "softmax"]

# A request for no token: the prompt's computation is all of it.
NO_TOKENS: Final = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What is to know of a model that gives vectors.

    ``size``: of its vectors, or the number of labels. ``normalizes``: vectors have length 1.
    ``squashes``: a score is a sigmoid of the logit, where the request does not ask otherwise.
    ``activation``: what makes classes' probabilities of their logits. ``labels``: their names.
    """

    task: PoolingTask
    size: int
    normalizes: bool = False
    squashes: bool = False
    activation: Activation = "identity"
    labels: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class PooledText:
    """What the runner knows of one text, and what it made of it.

    ``num_first``: of a pair of texts, the tokens that belong to the first; None is no pair.
    ``values``: float32 [D], the text's vector or the pair's logits; the runner sets it on the
    engine's thread, before the request's last delta.
    """

    num_first: int | None = None
    values: NDArray[np.float32] | None = None


def max_text_len(truncate_prompt_tokens: int | None, max_model_len: int) -> int | None:
    """How many tokens ``truncate_prompt_tokens`` leaves of a text; None is no truncation.

    Raises:
        InvalidParameterError: it is neither -1 nor in [1, max_model_len].
    """
    most = truncate_prompt_tokens
    if most == -1:
        return max_model_len
    if most is not None and not 1 <= most <= max_model_len:
        raise InvalidParameterError(
            f"truncate_prompt_tokens must be -1 or in [1, {max_model_len}], not {most}",
            "truncate_prompt_tokens",
        )
    return most


def encode_text(
    tokenizer: Tokenizer, text: str, most: int | None, add_special_tokens: bool = True
) -> list[int]:
    """A text's token ids, its end cut off so that there are at most ``most``, special ones kept.

    Raises:
        InvalidParameterError: the special tokens alone are more.
    """
    token_ids = tokenizer.encode(text, add_special_tokens)
    if most is None or len(token_ids) <= most:
        return token_ids
    plain = tokenizer.encode(text, False)
    num_special = len(token_ids) - len(plain)
    _check_room(num_special, most)
    first = next(i for i in range(num_special + 1) if token_ids[i : i + len(plain)] == plain)
    num_after = num_special - first
    return token_ids[: most - num_after] + token_ids[len(token_ids) - num_after :]


def encode_pair(
    tokenizer: Tokenizer, first: str, second: str, most: int | None
) -> tuple[list[int], PooledText]:
    """Two texts as a cross-encoder reads them: token ids, and where the second begins.

    The longer one is cut until there are at most ``most`` tokens, as cross-encoders are trained.

    Raises:
        InvalidParameterError: the special tokens alone are more.
    """
    token_ids, num_first = tokenizer.encode_pair(first, second, most)
    if most is not None and len(token_ids) > most:
        _check_room(len(token_ids), most)
    return token_ids, PooledText(num_first)


def _check_room(num_special: int, most: int) -> None:
    if most <= num_special:
        raise InvalidParameterError(
            f"truncate_prompt_tokens must leave room for {num_special} special tokens",
            "truncate_prompt_tokens",
        )


def vector(text: PooledText) -> NDArray[np.float32]:
    """What the runner made of a text that is done."""
    assert text.values is not None, "the request has ended well"
    return text.values


def cosine(a: PooledText, b: PooledText) -> float:
    """The cosine of two texts' vectors; 0 where one has no length."""
    x, y = vector(a).tolist(), vector(b).tolist()
    length = math.hypot(*x) * math.hypot(*y)
    return sum(map(operator.mul, x, y)) / length if length else 0.0


def squash(pair: PooledText, squashes: bool) -> float:
    """A cross-encoder's score of a pair: its logit, or a sigmoid of it."""
    logit = float(vector(pair)[0])
    return _sigmoid(logit) if squashes else logit


def probabilities(text: PooledText, activation: Activation) -> list[float]:
    """A classifier's answer, one number a label."""
    logits: list[float] = vector(text).tolist()
    match activation:
        case "identity":
            return logits
        case "sigmoid":
            return [_sigmoid(logit) for logit in logits]
        case "softmax":
            most = max(logits)
            powers = [math.exp(logit - most) for logit in logits]
            return [power / sum(powers) for power in powers]


def _sigmoid(logit: float) -> float:
    # Either form overflows on one side.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
