"""SamplingParams and BeamSearchParams: a request's settings for choosing tokens and for ending."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from enum import Enum
from typing import Any, Final

from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.structured_outputs import StructuredOutputsParams

# Samples of one request; vLLM's limit (VLLM_MAX_N_SEQUENCES).
MAX_N: Final = 16_384
# The core and the kernels keep counts and token ids as int32, and values as float32.
INT32_MAX: Final = 2**31 - 1
FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127
FLOAT32_TINY: Final = 2.0**-126
# As many as vLLM has room for; each is a column of what every step brings to the host.
MAX_LOGPROB_TOKEN_IDS: Final = 128
# Seeds are 64 bits, signed or unsigned, as torch takes them.
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
# A refused value is quoted in the error up to this length.
MAX_SHOWN_CHARS: Final = 100

_REAL = (float, int)


class RequestOutputKind(Enum):
    """The part of an answer that each output of a request holds.

    CUMULATIVE: all of it so far; DELTA: what is new; FINAL_ONLY: there is one output, at the end.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(slots=True)
class SamplingParams:
    """Sampling and stopping of one request, with vLLM's names, order and meanings.

    ``temperature=0`` is greedy. ``top_k`` 0 or -1 is off. ``logprobs=k`` returns the chosen token's
    log probability and the k best, -1 those of the whole vocabulary; None returns none. ``seed``
    makes a request's tokens a function of the request alone; -1 is None, a random one.
    ``max_tokens=None`` runs to the model's length limit. A stream's chunk leaves after
    ``stream_interval`` tokens, None is the engine's. ``spaces_between_special_tokens`` makes no
    difference where a tokenizer writes none; elsewhere false is refused. ``structured_outputs``
    constrains the text; it is applied last. ``truncate_prompt_tokens`` keeps so many of the
    last prompt tokens, -1 what fits. ``detokenize=False`` leaves texts empty. ``output_kind`` is
    for engines that give a request several outputs. ``logprob_token_ids`` are the tokens whose log
    probabilities come after the chosen one's, in place of the best. ``flat_logprobs`` keeps all of
    them as a ``FlatLogprobs``. ``extra_args`` is refused.

    Numbers may be numpy's, and lists stand for tuples; ``stop`` may be one string, and None an
    empty list; an empty list of ``allowed_token_ids`` is refused. Fields hold Python's own types
    after construction. They may be changed until the request is submitted: it gets a copy, which
    is checked again (``clone``).

    Raises:
        InvalidParameterError: from construction, naming the field.
        UnsupportedParameterError: a field that vLLM has and octavo has not.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    _: KW_ONLY
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream_interval: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    flat_logprobs: bool = False
    extra_args: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logprob_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_optional(cls, *args: Any, **given: Any) -> SamplingParams:
        """The same from arguments that may be None, which is a field's default.

        ``max_tokens=None`` has its own meaning.
        """
        names = [one.name for one in fields(cls) if not one.kw_only]
        given.update(zip(names, args, strict=False))
        kept = {k: v for k, v in given.items() if v is not None or k == "max_tokens"}
        return cls(**kept)

    def clone(self) -> SamplingParams:
        """A checked copy: later changes of the one do not reach the other.

        Raises:
            InvalidParameterError: a field that was changed has a value it may not have.
        """
        return replace(self)

    def __post_init__(self) -> None:
        # Written out: one of them per request, and loops over tables take several times as long.
        if not (
            type(self.n) is int
            and type(self.top_k) is int
            and type(self.min_tokens) is int
            and type(self.temperature) in _REAL
            and type(self.top_p) in _REAL
            and type(self.min_p) in _REAL
            and type(self.presence_penalty) in _REAL
            and type(self.frequency_penalty) in _REAL
            and type(self.repetition_penalty) in _REAL
            and (self.seed is None or type(self.seed) is int)
            and (self.max_tokens is None or type(self.max_tokens) is int)
            and (self.stream_interval is None or type(self.stream_interval) is int)
            and (self.logprobs is None or type(self.logprobs) is int)
            and (self.prompt_logprobs is None or type(self.prompt_logprobs) is int)
            and type(self.include_stop_str_in_output) is bool
            and type(self.ignore_eos) is bool
            and type(self.skip_special_tokens) is bool
            and type(self.spaces_between_special_tokens) is bool
            and type(self.detokenize) is bool
            and type(self.flat_logprobs) is bool
            and (self.truncate_prompt_tokens is None or type(self.truncate_prompt_tokens) is int)
        ):
            self._convert_scalars()
        if not (
            type(self.stop) is tuple
            and type(self.stop_token_ids) is tuple
            and type(self.allowed_token_ids) is tuple
            and type(self.bad_words) is tuple
            and type(self.logprob_token_ids) is tuple
            and type(self.logit_bias) is dict
        ):
            self._convert_containers()
        if self.seed == -1:
            self.seed = None
        # Comparisons in these forms are false for NaN.
        if not 1 <= self.n <= MAX_N:
            raise self._refusal("n", f"between 1 and {MAX_N}")
        if not 0 <= self.temperature <= 2:
            raise self._refusal("temperature", "between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise self._refusal("top_p", "in (0, 1]")
        if not -1 <= self.top_k <= INT32_MAX:
            raise self._refusal("top_k", f"-1, 0 or positive, at most {INT32_MAX}")
        if not 0 <= self.min_p <= 1:
            raise self._refusal("min_p", "between 0 and 1")
        if not -2 <= self.presence_penalty <= 2:
            raise self._refusal("presence_penalty", "between -2 and 2")
        if not -2 <= self.frequency_penalty <= 2:
            raise self._refusal("frequency_penalty", "between -2 and 2")
        if not FLOAT32_TINY <= self.repetition_penalty <= FLOAT32_MAX:
            raise self._refusal("repetition_penalty", "positive and finite, as a float32")
        if not 0 <= self.min_tokens <= INT32_MAX:
            raise self._refusal("min_tokens", f"between 0 and {INT32_MAX}")
        if self.max_tokens is not None:
            if not self.max_tokens >= 0:
                raise self._refusal("max_tokens", "at least 0")
            if not self.min_tokens <= self.max_tokens:
                raise self._refusal("min_tokens", "at most max_tokens")
        if not (self.seed is None or SEED_MIN <= self.seed <= SEED_MAX):
            raise self._refusal("seed", "an integer of 64 bits")
        if not (self.stream_interval is None or 1 <= self.stream_interval <= INT32_MAX):
            raise self._refusal("stream_interval", f"between 1 and {INT32_MAX}")
        if not (self.logprobs is None or -1 <= self.logprobs <= INT32_MAX):
            raise self._refusal("logprobs", f"between -1 and {INT32_MAX}")
        if not (self.prompt_logprobs is None or -1 <= self.prompt_logprobs <= INT32_MAX):
            raise self._refusal("prompt_logprobs", f"between -1 and {INT32_MAX}")
        most = self.truncate_prompt_tokens
        if not (most is None or most == -1 or 1 <= most <= INT32_MAX):
            raise self._refusal("truncate_prompt_tokens", "-1 or positive")
        if type(self.output_kind) is not RequestOutputKind:
            raise self._refusal("output_kind", "a RequestOutputKind")
        if self.extra_args:
            raise UnsupportedParameterError("extra_args is not supported", "extra_args")
        if self.stop:
            self._check_texts("stop")
            if not self.detokenize:
                raise InvalidParameterError("stop needs detokenize", "stop")
        if self.bad_words:
            self._check_texts("bad_words")
        if self.stop_token_ids:
            self._convert_ids("stop_token_ids")
        if self.allowed_token_ids:
            self._convert_ids("allowed_token_ids")
        if self.logprob_token_ids:
            self._convert_ids("logprob_token_ids")
            if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
                must = f"at most {MAX_LOGPROB_TOKEN_IDS} token ids"
                raise self._refusal("logprob_token_ids", must)
        if self.logit_bias:
            self._convert_bias()
        if self.structured_outputs is not None:
            self._convert_structure()

    @property
    def num_logprobs(self) -> int | None:
        """Log probabilities of each token beside the chosen one's; None asks for none at all."""
        return len(self.logprob_token_ids) or self.logprobs

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on the tokens before them."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken, without randomness."""
        return self.temperature < GREEDY_EPSILON

    # ------------------------------------------------- values of other types, and refusals

    def _convert_scalars(self) -> None:
        """Make numbers and booleans Python's own."""
        for param in ("n", "top_k", "min_tokens"):
            setattr(self, param, self._integer(param, getattr(self, param)))
        for param in (
            "seed",
            "max_tokens",
            "stream_interval",
            "logprobs",
            "prompt_logprobs",
            "truncate_prompt_tokens",
        ):
            value: object = getattr(self, param)
            if value is True and param.endswith("logprobs"):
                value = 1  # as in vLLM
            setattr(self, param, None if value is None else self._integer(param, value))
        for param in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        ):
            setattr(self, param, self._real(param, getattr(self, param), "a number"))
        for param in (
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
            "flat_logprobs",
        ):
            setattr(self, param, self._boolean(param, getattr(self, param)))

    def _convert_containers(self) -> None:
        """Make lists tuples, and a mapping a dict."""
        for param in (
            "stop",
            "stop_token_ids",
            "allowed_token_ids",
            "bad_words",
            "logprob_token_ids",
        ):
            value: Any = getattr(self, param)
            if type(value) is not tuple:
                setattr(self, param, self._items(param, value))
        bias: object = self.logit_bias
        if type(bias) is not dict:
            if not (bias is None or isinstance(bias, Mapping)):
                raise self._refusal("logit_bias", "a mapping from token ids to numbers")
            self.logit_bias = dict(bias or {})

    def _items(self, param: str, value: Any) -> tuple[Any, ...]:
        if value is None:
            return ()
        # Callers from elsewhere write one stop string as it is, whatever the type says.
        if param == "stop" and isinstance(value, str):
            return (value,)
        if param == "allowed_token_ids" and hasattr(value, "__len__") and len(value) == 0:
            raise InvalidParameterError(f"{param} must not be empty: no token is left", param)
        # What has no length may have no end.
        is_text = isinstance(value, str | bytes | bytearray | Mapping)
        if is_text or not hasattr(value, "__len__"):
            kind = "token ids" if param.endswith("token_ids") else "strings"
            raise self._refusal(param, f"a list of {kind}")
        return tuple(value)

    def _check_texts(self, param: str) -> None:
        """Refuse what cannot be looked for in a text."""
        for text in getattr(self, param):
            if not isinstance(text, str) or (param == "stop" and not text):
                kind = "non-empty strings" if param == "stop" else "strings"
                raise self._refusal(param, kind, text)
            try:
                text.encode()
            except UnicodeEncodeError:
                raise self._refusal(param, "Unicode text, without lone surrogates", text) from None

    def _convert_ids(self, param: str) -> None:
        ids = getattr(self, param)
        setattr(self, param, tuple([self._integer(param, token, "token ids") for token in ids]))

    def _convert_bias(self) -> None:
        """A dict of its own: the caller may go on to change the one that was given."""
        param = "logit_bias"
        bias = {
            self._integer(param, token, "a mapping from token ids"): self._real(
                param, value, "numbers"
            )
            for token, value in self.logit_bias.items()
        }
        for value in bias.values():
            if not (-FLOAT32_MAX <= value <= FLOAT32_MAX or value == -math.inf):
                raise self._refusal(param, "finite as float32, or -inf", value)
        setattr(self, param, bias)

    def _convert_structure(self) -> None:
        given: object = self.structured_outputs
        if isinstance(given, Mapping):
            try:
                self.structured_outputs = StructuredOutputsParams(**given)
            except TypeError:
                must = "StructuredOutputsParams, or a mapping of its fields"
                raise self._refusal("structured_outputs", must) from None
        elif not isinstance(given, StructuredOutputsParams):
            raise self._refusal("structured_outputs", "StructuredOutputsParams")

    def _integer(self, param: str, value: object, must: str = "an integer") -> int:
        if not isinstance(value, bool):
            try:
                return operator.index(value)  # type: ignore[arg-type]
            except TypeError:
                pass
        raise self._refusal(param, must, value)

    def _real(self, param: str, value: object, must: str) -> float:
        # numpy's numbers are registered as Real; strings of digits are not.
        if type(value) is not bool and isinstance(value, numbers.Real):
            try:
                return float(value)
            except OverflowError:
                pass
        raise self._refusal(param, must, value)

    def _boolean(self, param: str, value: object) -> bool:
        # numpy's bool is neither an int nor registered as a number.
        if isinstance(value, int) or type(value).__name__ in ("bool", "bool_"):
            if value == 0:
                return False
            if value == 1:
                return True
        raise self._refusal(param, "true or false", value)

    def _refusal(self, param: str, must: str, value: object = ...) -> InvalidParameterError:
        shown = _shown(getattr(self, param) if value is ... else value)
        return InvalidParameterError(f"{param} must be {must}, not {shown}", param)


def _shown(value: object) -> str:
    """A value as an error quotes it: short, whatever it is. Containers may be deep or large, and
    only their type is named."""
    if isinstance(value, int) and not -SEED_MAX <= value <= SEED_MAX:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, numbers.Number | str | bytes):
        text = repr(value)
        return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
    return type(value).__name__


# Below this a temperature divides logits into overflow; vLLM draws the same line.
GREEDY_EPSILON = 1e-5


@dataclass(slots=True)
class BeamSearchParams:
    """Settings of a beam search, with vLLM's names and meanings.

    ``beam_width`` continuations are kept. They are ranked by the sum of their tokens' log
    probabilities, divided by the number of tokens (the prompt's too, an end token not) to the
    power of ``length_penalty``. ``temperature`` makes no difference: the log probabilities are the
    model's own.

    Raises:
        InvalidParameterError: from construction, naming the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            if (value := getattr(self, name)) < 1:
                raise InvalidParameterError(f"{name} must be at least 1, not {value}", name)
