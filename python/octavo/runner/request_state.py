"""RequestState: what the runner knows of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo._core import Tokenizer
    from octavo.pooling import PooledText
    from octavo.prompt_logprobs import PromptLogprobs


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One sample's way of choosing tokens. It outlives preemption; slots do not.

    ``seed`` None: the sampler draws one at the first admission. ``eos_token_ids``: what min_tokens
    holds back, beside ``params.stop_token_ids``. ``prompt_token_ids`` is
    needed where there is a repetition penalty or ``prompt_logprobs``, which the runner fills; it
    fills ``pooled`` where the model gives vectors.
    ``output_token_ids`` is written by the sampler, and only where penalties or bad words look at
    it.
    """

    params: SamplingParams
    num_prompt_tokens: int
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    prompt_token_ids: Sequence[int] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    pooled: PooledText | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on which tokens came before."""
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)


def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences that spell each word at a text's start and after a space."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            if ids := tuple(tokenizer.encode(text, False)):
                sequences[ids] = None
    return tuple(sequences)
