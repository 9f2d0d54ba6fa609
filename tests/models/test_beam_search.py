"""LLM.beam_search against transformers' own beams, and against a plain search over its logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import make_prompt

from octavo import LLM, BeamSearchParams
from octavo.errors import InvalidParameterError, RequestTooLongError


@pytest.fixture
def tiny(save_tiny: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    """A folder, whose words are w0, w1, ..., one token each; transformers' module."""
    path, model = save_tiny("Llama")
    save_words(path)
    return path, model


def load(path: Path) -> LLM:
    return LLM(str(path), threads=1, dtype="float32", block_size=4, max_num_seqs=6)


def save_words(folder: Path, special: Collection[int] = ()) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{n}": n for n in range(300)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([f"w{n}" for n in special])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("beam_width", [1, 2, 5])
def test_beams_are_those_of_transformers(tiny: tuple[Path, Any], beam_width: int) -> None:
    llm, model = load(tiny[0]), tiny[1]
    prompts = [make_prompt(11), make_prompt(6), make_prompt(17)]
    params = BeamSearchParams(beam_width=beam_width, max_tokens=12, ignore_eos=True)
    outputs = llm.beam_search(prompts, params)
    model.generation_config.eos_token_id = None
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([prompt]),
                num_beams=beam_width,
                num_return_sequences=beam_width,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        assert [s.tokens for s in output.sequences] == expected.tolist()
        for sequence in output.sequences:
            total = sum_of_logprobs(model, sequence.tokens, len(prompt))
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
            assert sequence.finish_reason == "length"
            assert sequence.text == " ".join(f"w{n}" for n in sequence.tokens)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_ended_beams_compete(tiny: tuple[Path, Any], length_penalty: float) -> None:
    path, model = tiny
    prompt, width, most = make_prompt(9), 3, 6
    # End tokens that this model likes: the second best after the prompt, and another.
    best = logprobs_after(model, prompt).topk(2).indices.tolist()
    eos = {best[1], logprobs_after(model, [*prompt, best[0]]).argmax().item()}
    save_words(path, special=eos)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(eos)}))
    params = BeamSearchParams(beam_width=width, max_tokens=most, length_penalty=length_penalty)
    [output] = load(path).beam_search([prompt], params)
    expected = plain_search(model, prompt, width, most, eos, length_penalty)
    assert [s.tokens for s in output.sequences] == expected
    ends = [s.stop_reason for s in output.sequences]
    assert any(end in eos for end in ends)
    for sequence in output.sequences:
        assert (sequence.finish_reason == "stop") == (sequence.tokens[-1] in eos)
        assert sequence.text == " ".join(f"w{n}" for n in sequence.tokens)


def plain_search(
    model: Any, prompt: list[int], width: int, most: int, eos: set[int], penalty: float
) -> list[list[int]]:
    """The definition: every beam with its 2 * width likeliest tokens, the best ones kept."""

    def rank(beam: tuple[list[int], float]) -> float:
        tokens, total = beam
        return -total / (len(tokens) - (tokens[-1] in eos)) ** penalty

    beams, ended = [(prompt, 0.0)], []
    for _ in range(most):
        found = [
            ([*tokens, token], total + logprob)
            for tokens, total in beams
            for logprob, token in zip(*likeliest(model, tokens, 2 * width), strict=True)
        ]
        ended += [beam for beam in found if beam[0][-1] in eos]
        beams = sorted((b for b in found if b[0][-1] not in eos), key=rank)[:width]
    return [tokens for tokens, _ in sorted([*ended, *beams], key=rank)[:width]]


def likeliest(model: Any, tokens: list[int], count: int) -> tuple[list[float], list[int]]:
    values, ids = logprobs_after(model, tokens).topk(count)
    return values.tolist(), ids.tolist()


def logprobs_after(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)


def sum_of_logprobs(model: Any, tokens: list[int], num_prompt_tokens: int) -> float:
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return float(sum(logprobs[i - 1, tokens[i]] for i in range(num_prompt_tokens, len(tokens))))


def test_what_cannot_be_searched_is_refused(tiny: tuple[Path, Any]) -> None:
    llm = load(tiny[0])
    with pytest.raises(InvalidParameterError, match="beam_width must be at least 1, not 0"):
        BeamSearchParams(beam_width=0, max_tokens=1)
    with pytest.raises(InvalidParameterError, match="logprobs must be at most 20, not 22"):
        llm.beam_search("w5", BeamSearchParams(beam_width=11, max_tokens=1))
    with pytest.raises(InvalidParameterError, match="max_tokens must be at most 6 after this"):
        llm.beam_search([make_prompt(250)], BeamSearchParams(beam_width=2, max_tokens=7))
    with pytest.raises(RequestTooLongError):
        llm.beam_search([make_prompt(256)], BeamSearchParams(beam_width=2, max_tokens=7))
    assert llm.beam_search([], BeamSearchParams(beam_width=2, max_tokens=7)) == []
    [output] = llm.beam_search("w5 w6", BeamSearchParams(beam_width=2, max_tokens=1))
    assert output.sequences[0].text.startswith("w5 w6 w")
