"""RequestOutput: the output of a request so far, in vLLM's shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.logprobs import FlatLogprobs, Logprob
from octavo.prompt_logprobs import PromptLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from octavo._core import Delta, Tokenizer
    from octavo.prompt_logprobs import Candidates
    from octavo.sampling_params import SamplingParams


@dataclass(slots=True)
class RequestMetrics:
    """A finished request's time by phase, in seconds; None for a phase it did not reach."""

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


@dataclass(slots=True)
class ToolCall:
    """A call that the model has written. ``arguments``: JSON, cut short where the answer is."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request. ``index`` counts the request's ``n`` samples from 0.

    ``text`` is all that the model has written. An answer of ``LLM.chat`` that holds reasoning or
    calls of tools is also there in parts: ``reasoning``, ``tool_calls``, and what is left as
    ``content``. ``lora_request``: always None; octavo has no LoRA yet.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    # One entry per token: candidates by token id, the chosen token first.
    logprobs: list[dict[int, Logprob]] | FlatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    lora_request: None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    def finished(self) -> bool:
        """True once the sample has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and everything it has produced so far, or what is new (``output_kind``)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    # One entry per prompt token; the first is None, since nothing precedes it.
    prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    lora_request: None = None
    # Of models with an encoder, in vLLM.
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    # How the request has its log probabilities: as FlatLogprobs; of tokens that it names.
    _is_flat: bool = field(default=False, repr=False)
    _names_tokens: bool = field(default=False, repr=False)

    @classmethod
    def begin(
        cls, request_id: str, prompt: str | None, token_ids: Iterable[int], params: SamplingParams
    ) -> RequestOutput:
        """The output of a request that has produced nothing yet."""
        return cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=list(token_ids),
            outputs=[CompletionOutput(index) for index in range(params.n)],
            _is_flat=params.flat_logprobs,
            _names_tokens=bool(params.logprob_token_ids),
        )

    def apply(self, index: int, delta: Delta, tokenizer: Tokenizer | None) -> None:
        """Append what happened to sample ``index``; without a tokenizer, no texts."""
        output = self.outputs[index]
        if tokenizer is not None:
            output.text += delta.text
        output.token_ids.extend(delta.token_ids)
        if (news := delta.logprobs) is not None:
            if output.logprobs is None:
                output.logprobs = FlatLogprobs() if self._is_flat else []
            output.logprobs.extend(
                _by_id(candidates, tokenizer, self._names_tokens) for candidates in news
            )
            output.cumulative_logprob = delta.cumulative_logprob
        # Every sample brings them; they are the same.
        if isinstance(delta.extra, PromptLogprobs) and self.prompt_logprobs is None:
            rows = delta.extra.positions()
            self.prompt_logprobs = FlatLogprobs() if self._is_flat else []
            self.prompt_logprobs.append(None)
            self.prompt_logprobs.extend(_by_id(row, tokenizer) for row in rows)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            self.metrics = RequestMetrics(delta.queue_s, delta.prefill_s, delta.decode_s)
            self.finished = all(o.finish_reason is not None for o in self.outputs)

    def take(self, index: int, delta: Delta, tokenizer: Tokenizer | None) -> RequestOutput:
        """An output of its own for what happened to sample ``index``, and for nothing else."""
        self.outputs[index] = CompletionOutput(index)
        self.prompt_logprobs = None
        self.apply(index, delta, tokenizer)
        return dataclasses.replace(self, outputs=[self.outputs[index]])


def _by_id(
    candidates: Candidates, tokenizer: Tokenizer | None, names_tokens: bool = False
) -> dict[int, Logprob]:
    """Candidates by token id, the chosen one first, then the best in order, or those that the
    request names: nobody has looked for their ranks."""
    by_id: dict[int, Logprob] = {}
    for token_id, logprob, rank in candidates:
        # The chosen one may come again among the others.
        if token_id not in by_id:
            known = None if names_tokens and by_id else rank
            text = None if tokenizer is None else tokenizer.decode([token_id], False)
            by_id[token_id] = Logprob(logprob, known, text)
    return by_id


@dataclass(slots=True)
class EmbeddingOutput:
    """``embedding``: the text's vector, [D] float32."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """D."""
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """``score``: of a pair of texts; higher fits better."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """One pair of texts and its score. ``prompt_token_ids``: of both."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True


@dataclass(slots=True)
class ClassificationOutput:
    """``probs``: one per label, in the order of the model's ``id2label``; see ``LLM.classify``."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """The model's number of labels."""
        return len(self.probs)


@dataclass(slots=True)
class ClassificationRequestOutput:
    """One text and its classes' probabilities."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ClassificationOutput
    finished: bool = True


@dataclass(slots=True)
class PoolingOutput:
    """``data``: the text's vector or its labels' probabilities, float32 [D]."""

    data: Tensor


@dataclass(slots=True)
class PoolingRequestOutput:
    """One text and its tensor. ``finished`` is always true."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: PoolingOutput
    finished: bool = True


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One text and its vector. ``prompt`` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
