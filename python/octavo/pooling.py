"""Pooling models: their tasks, the texts they read, and scores from their vectors."""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.sampling_params import SamplingParams
from octavo.task_prompts import TaskPrompts
from octavo.text_form import TextForm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo._core import Tokenizer
    from octavo.pooling_params import PoolingParams

    # One text's result, float32 [D]: its embedding, or a classifier's logits.
    Vector = NDArray[np.float32]
    # The same, or a vector for each token, [T, D].
    Pooled = NDArray[np.float32]

# A pooling model's task: to embed texts, or each of their tokens (for late interaction), to score
# pairs (a classifier of one label, a cross-encoder), or to classify (a classifier of several), each
# token or the whole.
PoolingTask = Literal["embed", "token_embed", "score", "classify", "token_classify"]

# A classifier's last function, from logits to probabilities.
Activation = Literal["identity", "sigmoid", "softmax"]

# A request that computes its prompt and nothing else.
NO_TOKENS: Final = SamplingParams(max_tokens=0)


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """A pooling model's task and outputs.

    ``size``: of its vectors, or the number of labels. ``normalizes``: vectors have length 1.
    ``squashes``: a score is a sigmoid of the logit, unless the request asks otherwise.
    ``activation``: from labels' logits to their probabilities. ``labels``: their names.
    ``joins``: a pair is one text, the second right after the first. ``prompts``: for
    the texts of a task. ``forms``: of queries and documents, for a vector a token.
    """

    task: PoolingTask
    size: int
    normalizes: bool = False
    squashes: bool = False
    activation: Activation = "identity"
    labels: tuple[str, ...] = ()
    joins: bool = False
    prompts: TaskPrompts = TaskPrompts()
    forms: Mapping[str, TextForm] = field(default_factory=dict)

    @property
    def is_per_token(self) -> bool:
        """True where a text's result is [T, D]."""
        return self.task in ("token_embed", "token_classify")

    @property
    def embeds(self) -> bool:
        """True where results are vectors, not logits."""
        return self.task in ("embed", "token_embed")


class EncodedText(NamedTuple):
    """A text, or a pair of texts, as a pooling model reads it.

    ``num_first``: of a pair, the tokens that belong to the first text; of a query with fillers,
    those that are attended to; None: all. ``kept``: bool [T], the tokens whose vectors are
    answered; None: all.
    """

    token_ids: Sequence[int]
    num_first: int | None = None
    kept: NDArray[np.bool_] | None = None

    def kept_of(self, pooled: Pooled) -> Pooled:
        """The answer made of a text's result."""
        return pooled if self.kept is None else pooled[self.kept]


def max_text_len(truncate_prompt_tokens: int | None, max_model_len: int) -> int | None:
    """The most tokens that ``truncate_prompt_tokens`` leaves of a text; None is no truncation.

    Raises:
        InvalidParameterError: it is neither -1 nor in [1, max_model_len].
    """
    most = truncate_prompt_tokens
    if most == -1:
        return max_model_len
    if most is not None and not 1 <= most <= max_model_len:
        raise InvalidParameterError(
            f"truncate_prompt_tokens must be -1 or in [1, {max_model_len}], not {most}. "
            "Please request a smaller truncation size.",
            "truncate_prompt_tokens",
        )
    return most


def encode_text(
    tokenizer: Tokenizer,
    text: str,
    most: int | None,
    add_special_tokens: bool = True,
    side: str | None = None,
) -> list[int]:
    """A text's token ids, at most ``most``: its special tokens stay.

    Args:
        side: "right", as None is, cuts the text's end off, "left" its beginning.

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
    room = most - num_special
    kept = plain[len(plain) - room :] if side == "left" else plain[:room]
    return token_ids[:first] + kept + token_ids[first + len(plain) :]


def cut_text(tokenizer: Tokenizer, text: str, most: int) -> str:
    """The longest beginning of a text that has at most ``most`` tokens; 0: the whole text."""

    def length(num_chars: int) -> int:
        return len(tokenizer.encode(text[:num_chars], False))

    if not most or length(len(text)) <= most:
        return text
    return text[: bisect.bisect_right(range(len(text)), most, key=length) - 1]


def encode_pair(
    tokenizer: Tokenizer, first: str, second: str, most: int | None, *, joins: bool = False
) -> EncodedText:
    """Two texts as a cross-encoder reads them.

    The longer one is cut until there are at most ``most`` tokens, as cross-encoders are trained;
    with ``joins`` the end of the one text that both make.

    Raises:
        InvalidParameterError: the special tokens alone are more.
    """
    if joins:
        return EncodedText(encode_text(tokenizer, first + second, most))
    token_ids, num_first = tokenizer.encode_pair(first, second, most)
    if most is not None and len(token_ids) > most:
        _check_room(len(token_ids), most)
    return EncodedText(token_ids, num_first)


def _check_room(num_special: int, most: int) -> None:
    if most <= num_special:
        raise InvalidParameterError(
            f"truncate_prompt_tokens must leave room for {num_special} special tokens",
            "truncate_prompt_tokens",
        )


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of two vectors; 0 where one has no length."""
    x, y = a.tolist(), b.tolist()
    length = math.hypot(*x) * math.hypot(*y)
    return sum(map(operator.mul, x, y)) / length if length else 0.0


def check_params(params: PoolingParams, info: PoolingInfo) -> None:
    """Check a request's settings against a model.

    Raises:
        InvalidParameterError, UnsupportedParameterError: naming the field.
    """
    tasks = {
        "score": ("score", "classify"),
        "classify": ("classify",),
        "embed": ("embed", "score"),
        "token_embed": ("token_embed", "score"),
        "token_classify": ("token_classify",),
    }
    if params.task is not None and params.task not in tasks[info.task]:
        raise InvalidParameterError(f"task must be {info.task}, not {params.task!r}", "task")
    if params.embedding_mode is not None and params.embedding_mode not in info.forms:
        raise InvalidParameterError(
            "embedding_mode needs a model whose queries and documents have forms of their own",
            "embedding_mode",
        )
    if info.embeds:
        vector_size(info, params.dimensions, "dimensions")
        if params.use_activation is False and info.normalizes:
            raise UnsupportedParameterError(
                "use_activation=False is not supported: this model's vectors have length 1",
                "use_activation",
            )
    elif params.dimensions is not None:
        raise InvalidParameterError("dimensions needs a model that embeds", "dimensions")


def vector_size(info: PoolingInfo, asked: int | None, param: str) -> int:
    """The number of a vector's numbers that a request is answered with.

    Raises:
        InvalidParameterError: it asks for more than there are.
    """
    size = asked or info.size
    if size > info.size:
        raise InvalidParameterError(
            f"{param} must be at most {info.size}, the size of this model's vectors, not {size}",
            param,
        )
    return size


def cut(values: Pooled, info: PoolingInfo, size: int) -> Pooled:
    """The first ``size`` numbers of a vector [D], or of each token's [T, D]."""
    if size == info.size:
        return values
    found: Pooled = values[..., :size]
    if info.normalizes:
        # What is left of a vector is shorter than 1.
        found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
    return found


def pooled_values(
    vector: Pooled, info: PoolingInfo, params: PoolingParams
) -> list[float] | list[list[float]]:
    """A text's vector, or its tokens', or a number per label; ``params`` are checked."""
    if info.task == "token_embed":
        rows: list[list[float]] = cut(vector, info, params.dimensions or info.size).tolist()
        return rows
    activation = "identity" if params.use_activation is False else info.activation
    if info.task == "token_classify":
        return [probabilities(row, activation) for row in vector]
    if info.task != "embed":
        return probabilities(vector, activation)
    values: list[float] = vector.tolist()[: params.dimensions]
    if info.normalizes and len(values) < info.size:
        # What is left of a vector is shorter than 1.
        length = math.hypot(*values) or 1.0
        values = [value / length for value in values]
    return values


def squash(logits: Vector, squashes: bool) -> float:
    """A cross-encoder's score of a pair: its logit, or a sigmoid of it."""
    logit = float(logits[0])
    return _sigmoid(logit) if squashes else logit


def probabilities(logits: Vector, activation: Activation) -> list[float]:
    """A classifier's answer, one number per label."""
    values: list[float] = logits.tolist()
    match activation:
        case "identity":
            return values
        case "sigmoid":
            return [_sigmoid(logit) for logit in values]
        case "softmax":
            most = max(values)
            powers = [math.exp(logit - most) for logit in values]
            return [power / sum(powers) for power in powers]


def _sigmoid(logit: float) -> float:
    # Either form overflows on one side.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
