"""What vLLM's offline interface writes: -1 for something else, and keys of a prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from octavo.config import EngineConfig
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.llm import LLM
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
    for key in ("multi_modal_data", "prompt_embeds", "mm_processor_kwargs"):
        with pytest.raises(UnsupportedParameterError, match=f"a prompt's {key} is not supported"):
            cached(**{key: {"image": 1}})
    for salt in ("", 7):
        with pytest.raises(InvalidParameterError, match="cache_salt must be a non-empty string"):
            cached(cache_salt=salt)
