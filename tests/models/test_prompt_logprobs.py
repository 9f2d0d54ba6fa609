"""Log probabilities of prompts, against transformers, through each way of scheduling."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo._core import TokenIds
from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json
from octavo.llm import LLM
from octavo.outputs import RequestOutput
from octavo.prompt_logprobs import PromptLogprobs
from octavo.runner import prompt_scorer
from octavo.runner.prompt_rows import PromptRows
from octavo.sampling_params import SamplingParams


def make(path: Any, **config: Any) -> LLM:
    (path / "tokenizer.json").write_text(dummy_tokenizer_json(300))
    defaults = {"dtype": "float32", "threads": 1, "max_num_seqs": 4, "block_size": 4}
    return LLM(str(path), **defaults | config)


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [rng.choices(range(3, 300), k=length) for length in lengths]


def ask(llm: LLM, asked: list[list[int]], **params: Any) -> list[RequestOutput]:
    sampling = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "prompt_logprobs": 3} | params
    )
    return llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)


def assert_scored(model: Any, ids: list[int], found: Any, num_top: int) -> None:
    """That every entry is what transformers says of the token after the same beginning."""
    assert found is not None
    assert len(found) == len(ids)
    assert found[0] is None
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for token, entry, row in zip(ids[1:], found[1:], expected, strict=False):
        best = row.topk(num_top).indices.tolist()
        assert list(entry) == list(dict.fromkeys([token, *best]))
        assert entry[token].rank == int((row > row[token]).sum()) + 1
        for candidate, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(row[candidate]), abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {},
        # A prompt in many chunks, beside other prompts' chunks and decodes.
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 5, "enable_prefix_caching": False},
        # Too few blocks for all: some are preempted in the middle of their prompts, or after.
        {"max_num_batched_tokens": 16, "kv_cache_memory_bytes": 24 * 4 * 3 * 2 * 2 * 16 * 4},
    ],
    ids=["whole", "chunks", "uncached", "preempted"],
)
def test_they_are_those_of_transformers(
    save_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    # So few logits at a time that rows of one chunk come in several parts.
    monkeypatch.setattr(prompt_scorer, "MAX_LOGITS_BYTES", 4 * 300 * 6)
    path, model = save_tiny("Llama")
    llm = make(path, max_model_len=96, **config)
    asked = prompts(1, 2, 40, 41, 17, 64, 8, 33)
    # The second time the prefix cache knows every prompt.
    for _ in range(2):
        for ids, output in zip(asked, ask(llm, asked, max_tokens=20), strict=True):
            assert_scored(model, ids, output.prompt_logprobs, 3)
            assert len(output.outputs[0].token_ids) == 20


def test_requests_for_no_tokens_and_several_samples(save_tiny: Callable[..., Any]) -> None:
    path, model = save_tiny("Llama")
    llm = make(path, max_model_len=64, max_num_batched_tokens=12)
    asked = prompts(30, 31, 64)
    for ids, output in zip(asked, ask(llm, asked, max_tokens=0), strict=True):
        assert output.outputs[0].token_ids == []
        assert output.outputs[0].finish_reason == "length"
        assert_scored(model, ids, output.prompt_logprobs, 3)
    several = {"n": 3, "prompt_logprobs": 0, "temperature": 1.0, "seed": 1}
    for ids, output in zip(asked[:2], ask(llm, asked[:2], **several), strict=True):
        assert_scored(model, ids, output.prompt_logprobs, 0)
        assert len(output.outputs) == 3


def test_they_change_no_token(save_tiny: Callable[..., Any]) -> None:
    path, _ = save_tiny("Llama")
    llm = make(path, max_model_len=96, max_num_batched_tokens=9)
    asked = prompts(20, 5, 33)
    plain = ask(llm, asked, prompt_logprobs=None, max_tokens=12)
    assert all(output.prompt_logprobs is None for output in plain)
    scored = ask(llm, asked, max_tokens=12)
    assert [o.outputs[0].token_ids for o in scored] == [o.outputs[0].token_ids for o in plain]


def test_rows_come_once_and_in_order() -> None:
    rows = PromptRows(range(1), 6, 1)

    def add(first: int, count: int) -> PromptLogprobs | None:
        ids = torch.arange(first, first + count, dtype=torch.int32)
        pairs = torch.stack([ids, ids + 100], 1)
        return rows.add(first, pairs.numpy(), -pairs.float().numpy(), ids.numpy())

    with pytest.raises(ValueError, match="0 rows before prompt token 2"):
        add(2, 1)
    assert add(1, 3) is None
    assert add(1, 2) is None
    scores = add(3, 4)
    assert scores is not None
    assert rows.is_complete
    assert add(3, 4) is None, "it was handed over"
    assert len(scores) == 6
    expected = [[(t, -float(t), t), (t + 100, -float(t + 100), 1)] for t in range(1, 7)]
    assert scores.positions() == expected
    assert scores.positions(0) == [row[:1] for row in expected]


def test_every_sample_brings_them_with_its_first_token(save_tiny: Callable[..., Any]) -> None:
    path, _ = save_tiny("Llama")
    llm = make(path, max_model_len=64, max_num_batched_tokens=7)
    engine = llm._engine
    params = SamplingParams(n=3, max_tokens=3, prompt_logprobs=2, ignore_eos=True)
    for length in (1, 2, 20):
        [ids] = prompts(length)
        samples = engine.prepare(TokenIds(ids), params, delivery="delta")
        engine.submit(samples)
        firsts: dict[int, Any] = {}
        while engine.step():
            for delta in engine.core.outbox.drain():
                assert (delta.extra is None) == (delta.request_id in firsts)
                firsts.setdefault(delta.request_id, delta.extra)
        assert list(firsts) == [sample.request_id for sample in samples]
        scores = firsts[samples[0].request_id]
        assert all(extra is scores for extra in firsts.values())
        assert scores.ids.shape == scores.logprobs.shape == (length - 1, 3)
        assert scores.ids[:, 0].tolist() == ids[1:]
