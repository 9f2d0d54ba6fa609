"""Beam search over the engine: every step is a batch of requests for one token.

The prefix cache makes a beam's next step cost its last block, not its whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from octavo.outputs import RequestOutput
from octavo.sampling_params import BeamSearchParams, SamplingParams


@dataclass(slots=True)
class BeamSearchSequence:
    """One continuation. ``tokens`` and ``text``: the prompt's too, special tokens among them.

    ``finish_reason``: "stop" where it ended with an end token, which is ``stop_reason``; else
    "length".
    """

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """``sequences``: the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Search:
    """One prompt's beams, and those that have ended."""

    beams: list[BeamSearchSequence]
    ended: list[BeamSearchSequence] = field(default_factory=list)


def search(
    prompts: Sequence[Sequence[int]],
    params: BeamSearchParams,
    step: Callable[[Sequence[list[int]], SamplingParams], list[RequestOutput]],
    decode: Callable[[list[int]], str],
    eos_token_ids: Collection[int],
    progress: Callable[[], object],
) -> list[BeamSearchOutput]:
    """``step`` asks the model for one token after each beam of all prompts; ``progress`` is
    called after each."""
    eos = frozenset(() if params.ignore_eos else eos_token_ids)
    # So many that a beam whose best half would all end still fills the width.
    num_best = 2 * params.beam_width
    one_token = SamplingParams(temperature=0, max_tokens=1, logprobs=num_best, ignore_eos=True)

    def rank(sequence: BeamSearchSequence) -> float:
        length = len(sequence.tokens) - (sequence.stop_reason is not None)
        return float(-sequence.cum_logprob / length**params.length_penalty)

    searches = [_Search([BeamSearchSequence(list(prompt))]) for prompt in prompts]
    for _ in range(params.max_tokens):
        flat = [beam.tokens for one in searches for beam in one.beams]
        if not flat:
            break
        answers = iter(step(flat, one_token))
        for one in searches:
            found = [child for beam in one.beams for child in _children(beam, next(answers), eos)]
            one.ended += [child for child in found if child.finish_reason is not None]
            open_ = [child for child in found if child.finish_reason is None]
            one.beams = sorted(open_, key=rank)[: params.beam_width]
        progress()
    outputs = []
    for one in searches:
        for beam in one.beams:
            beam.finish_reason = "length"
        best = sorted([*one.ended, *one.beams], key=rank)[: params.beam_width]
        for sequence in best:
            sequence.text = decode(sequence.tokens)
        outputs.append(BeamSearchOutput(best))
    return outputs


def _children(
    beam: BeamSearchSequence, answer: RequestOutput, eos: frozenset[int]
) -> list[BeamSearchSequence]:
    """A beam with each of its likeliest next tokens."""
    logprobs = answer.outputs[0].logprobs
    assert logprobs is not None, "they were asked for"
    children = []
    for token_id, candidate in logprobs[0].items():
        child = BeamSearchSequence([*beam.tokens, token_id], beam.cum_logprob + candidate.logprob)
        if token_id in eos:
            child.finish_reason, child.stop_reason = "stop", token_id
        children.append(child)
    return children
