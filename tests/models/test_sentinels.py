"""What vLLM's offline interface writes: -1 for something else, and keys of a prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.llm import LLM
from octavo.logprobs import FlatLogprobs
from octavo.sampling_params import SamplingParams

VOCAB_SIZE = 300
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
}
PROMPT = {"prompt_token_ids": [5, 6, 7]}


def open_llm(folder: Path, max_logprobs: int) -> LLM:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return LLM(str(folder), load_format="dummy", dtype="float32", max_logprobs=max_logprobs)


def test_all_logprobs(tmp_path: Path) -> None:
    llm = open_llm(tmp_path, -1)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    positions = [*(output.outputs[0].logprobs or []), *(output.prompt_logprobs or [])[1:]]
    assert len(positions) == 4
    for position in positions:
        assert position is not None
        assert sorted(position) == list(range(VOCAB_SIZE))
        total = sum(math.exp(entry.logprob) for entry in position.values())
        assert total == pytest.approx(1, abs=1e-4)
    # Without a limit a number above the usual one goes, too.
    (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, logprobs=50), use_tqdm=False)
    assert len((output.outputs[0].logprobs or [])[0]) in (50, 51)


def test_logprobs_of_named_tokens(tmp_path: Path) -> None:
    """In place of the best, beside requests of other kinds in the same steps."""
    llm = open_llm(tmp_path, 20)
    named = [299, 0, 17, 17]
    kinds: list[dict[str, Any]] = [
        {"logprob_token_ids": named},
        {"logprobs": 20},
        {},
        {"logprobs": 3, "logprob_token_ids": [5]},
    ]
    wanted = [SamplingParams(temperature=0, max_tokens=3, **kind) for kind in kinds]
    outputs = llm.generate([PROMPT] * len(kinds), wanted, use_tqdm=False)
    some, best, plain, one = [output.outputs[0] for output in outputs]
    assert some.token_ids == best.token_ids == plain.token_ids
    assert plain.logprobs is None
    assert some.logprobs is not None
    assert one.logprobs is not None
    assert best.logprobs is not None
    for token, position, of_best, of_one in zip(
        some.token_ids, some.logprobs, best.logprobs, one.logprobs, strict=True
    ):
        # The chosen token first; nobody has looked for the ranks of the others.
        assert list(position) == list(dict.fromkeys([token, *named]))
        assert [entry.rank for entry in position.values()] == [1] + [None] * (len(position) - 1)
        assert list(of_one) == list(dict.fromkeys([token, 5]))
        assert next(iter(of_best)) == token
        for known in position.keys() & of_best.keys():
            assert position[known].logprob == pytest.approx(of_best[known].logprob, abs=1e-5)
    total = llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    assert total[0].outputs[0].token_ids == some.token_ids[:1]
    for wrong, match in (
        ({"logprob_token_ids": [300]}, r"logprob_token_ids must hold token ids in \[0, 300\)"),
        ({"logprob_token_ids": [-1]}, "logprob_token_ids must hold token ids"),
        ({"logprob_token_ids": [1] * 129}, "logprob_token_ids must be at most 128 token ids"),
        ({"logprob_token_ids": ["a"]}, "logprob_token_ids must be token ids"),
    ):
        with pytest.raises(InvalidParameterError, match=match):
            llm.generate([PROMPT], SamplingParams(**wrong), use_tqdm=False)


def test_candidates_come_in_order(tmp_path: Path) -> None:
    """The chosen token first, then the best, as programs take the first for the chosen one."""
    llm = open_llm(tmp_path, 20)
    params = SamplingParams(seed=3, max_tokens=8, logprobs=4, prompt_logprobs=3, ignore_eos=True)
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    sample = output.outputs[0]
    assert output.prompt_logprobs is not None
    assert sample.logprobs is not None
    own = [*PROMPT["prompt_token_ids"][1:], *sample.token_ids]
    rows = [*output.prompt_logprobs[1:], *sample.logprobs]
    ranks = []
    for token, row in zip(own, rows, strict=True):
        assert row is not None
        first, *others = row
        assert first == token
        found = [row[other].rank for other in others]
        assert found == [r for r in range(1, 5) if r != row[token].rank][: len(found)]
        ranks.append(row[token].rank)
    assert max(rank or 0 for rank in ranks) > 4, "the chosen one must not always be among the best"


def test_flat_logprobs_read_as_the_dicts(tmp_path: Path) -> None:
    llm = open_llm(tmp_path, 20)
    wanted = [
        SamplingParams(
            seed=3, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True, flat_logprobs=flat
        )
        for flat in (False, True)
    ]
    dicts, flat = llm.generate([PROMPT] * 2, wanted, use_tqdm=False)
    assert dicts.prompt_logprobs is not None
    plain, logprobs = dicts.outputs[0].logprobs, flat.outputs[0].logprobs
    assert isinstance(plain, list)
    assert isinstance(logprobs, FlatLogprobs)
    assert isinstance(flat.prompt_logprobs, FlatLogprobs)
    assert len(logprobs) == 5
    assert list(logprobs) == plain
    assert logprobs[-1] == plain[-1]
    assert [list(row) for row in logprobs] == [list(row) for row in plain]
    assert list(logprobs[1:4]) == plain[1:4]
    assert list(logprobs[5:]) == []
    assert list(flat.prompt_logprobs) == [{}, *dicts.prompt_logprobs[1:]]
    assert len(logprobs.token_ids) == logprobs.end_indices[-1] == sum(map(len, plain))
    assert logprobs.ranks[0] == plain[0][logprobs.token_ids[0]].rank
    for change in (lambda: logprobs.insert(0, None), logprobs.pop, logprobs.clear):
        with pytest.raises(TypeError, match="grow at their end"):
            change()
    # Without log probabilities there is nothing to be flat.
    (output,) = llm.generate([PROMPT], SamplingParams(flat_logprobs=True), use_tqdm=False)
    assert output.outputs[0].logprobs is None


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_all_logprobs_are_more_than_a_limit(tmp_path: Path, name: str) -> None:
    llm = open_llm(tmp_path, 20)
    with pytest.raises(InvalidParameterError, match=f"{name} must be at most 20, not -1"):
        llm.generate([PROMPT], SamplingParams(**{name: -1}), use_tqdm=False)


def test_minus_one_is_no_seed_and_no_top_k() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=-1, seed=-1)
    for name in ("logprobs", "prompt_logprobs", "top_k"):
        with pytest.raises(InvalidParameterError, match=name):
            SamplingParams(**{name: -2})
    with pytest.raises(ValueError, match="max_logprobs must be at least 0, or -1"):
        EngineConfig(max_logprobs=-2)


def test_keys_of_a_prompt_are_honoured_or_refused(tmp_path: Path) -> None:
    llm = open_llm(tmp_path, 20)
    params = SamplingParams(temperature=0, max_tokens=1)
    ids = list(range(3, 40))

    def cached(**keys: object) -> int:
        prompt = {"prompt_token_ids": ids, **keys}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        return output.num_cached_tokens

    found = [cached(cache_salt=salt) for salt in ("a", "b", "a", "b", None)]
    assert found[:2] == [0, 0]
    assert found[2] == found[3] > 0
    assert found[4] == 0
    assert cached(multi_modal_data=None, type="token") > 0
    assert cached(multi_modal_data={}, mm_processor_kwargs={}) > 0
    for key in ("multi_modal_data", "prompt_embeds", "mm_processor_kwargs"):
        with pytest.raises(UnsupportedParameterError, match=f"a prompt's {key} is not supported"):
            cached(**{key: {"image": 1}})
    for salt in ("", 7):
        with pytest.raises(InvalidParameterError, match="cache_salt must be a non-empty string"):
            cached(cache_salt=salt)
