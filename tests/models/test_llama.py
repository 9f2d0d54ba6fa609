"""LlamaForCausalLM through each way of scheduling, against transformers, in float32."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from octavo.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def prompt(length: int, seed: int = 0, vocab_size: int = 300) -> list[int]:
    return random.Random(seed).choices(range(3, vocab_size), k=length)


def expected_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
        return logits


def assert_greedy(model: Any, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
    """That transformers, given the same beginning, picks each of these tokens itself."""
    logits = expected_logits(model, [*prompt_ids, *output_ids])[len(prompt_ids) - 1 : -1]
    best = logits.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    for i, token in enumerate(output_ids):
        if int(logits[i].argmax()) != token:
            lost = float(best[i, 0] - logits[i, token])
            assert lost < 1e-4, f"token {i}: {lost} below the best, which leads by {gaps[i]}"


def test_sharded_weights_are_those_of_one_file(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Llama", max_shard_size="50KB")
    assert len(list(path.glob("model-*.safetensors"))) > 3
    token_ids = prompt(40)
    torch.testing.assert_close(
        driver(path, attention_backend="reference").logits(token_ids),
        expected_logits(model, token_ids),
        atol=1e-4,
        rtol=1e-4,
    )


def test_chunked_prefill_changes_nothing(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    path, model = save_tiny("Llama")
    engine = driver(path, attention_backend=backend, max_num_batched_tokens=16)
    token_ids = prompt(100)
    [output] = engine.generate([token_ids])
    assert len(engine.batch_sizes) >= 100 // 16 + 63
    assert_greedy(model, token_ids, output.token_ids)


def test_a_prefix_cache_hit_changes_nothing(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    path, model = save_tiny("Llama")
    engine = driver(path, attention_backend=backend)
    shared = prompt(64)
    engine.generate([shared + prompt(9, seed=1)])
    token_ids = shared + prompt(20, seed=2)
    [output] = engine.generate([token_ids])
    assert output.num_cached_tokens == 64
    assert_greedy(model, token_ids, output.token_ids)
    [again] = engine.generate([token_ids])
    assert again.num_cached_tokens >= 80
    assert again.token_ids == output.token_ids


def test_preemption_changes_nothing(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    path, model = save_tiny("Llama")
    # Keys and values of 160 tokens, for three requests that come to 114 each.
    nbytes = 160 * 2 * 3 * (2 * 16) * 4
    engine = driver(
        path, attention_backend=backend, kv_cache_memory_bytes=nbytes, max_model_len=128
    )
    assert engine.runner.num_blocks == 10
    prompts = [prompt(50, seed) for seed in range(3)]
    outputs = engine.generate(prompts)
    assert engine.core.stats()["num_preemptions"] > 0
    for token_ids, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == 64
        assert_greedy(model, token_ids, output.token_ids)


def test_a_mixed_batch_changes_nothing(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    path, model = save_tiny("Llama")
    engine = driver(path, attention_backend=backend, max_num_batched_tokens=48, max_num_seqs=5)
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 16, 17, 90, 130, 3, 60))]
    outputs = engine.generate(prompts)
    # Some steps held decodes and prefill chunks at once.
    assert any(0 < decodes < reqs for decodes, reqs in engine.batch_sizes)
    for token_ids, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, token_ids, output.token_ids)


def test_a_seeded_request_says_the_same_beside_others(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], backend: str
) -> None:
    path, _ = save_tiny("Llama")
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)
    mine = prompt(30)
    alone = driver(path, attention_backend=backend).generate([mine], params)[0]
    busy = driver(path, attention_backend=backend, max_num_batched_tokens=40)
    others = SamplingParams(temperature=0.5, top_k=5, max_tokens=40, ignore_eos=True)
    for length in (1, 50, 90):
        busy.add(prompt(length, seed=length), others)
    request_id = busy.add(mine, params)
    for length in (3, 70):
        busy.add(prompt(length, seed=length), others)
    assert busy.finish()[request_id].token_ids == alone.token_ids
    # And once more where its prompt is in the cache.
    assert busy.generate([mine], params)[0].token_ids == alone.token_ids


def test_logprobs_are_those_of_transformers(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, model = save_tiny("Llama")
    engine = driver(path, attention_backend="reference")
    params = SamplingParams(temperature=1.0, seed=3, logprobs=4, max_tokens=20, ignore_eos=True)
    token_ids = prompt(30)
    [output] = engine.generate([token_ids], params)
    logits = expected_logits(model, [*token_ids, *output.token_ids])[29:-1]
    expected = logits.log_softmax(-1)
    assert len(output.logprobs) == 20
    ranks = []
    for i, entries in enumerate(output.logprobs):
        assert entries[0][0] == output.token_ids[i]
        assert len(entries) == 5
        assert [e[0] for e in entries[1:]] == expected[i].topk(4).indices.tolist()
        for token, logprob, _rank in entries:
            assert logprob == pytest.approx(float(expected[i, token]), abs=1e-4)
        rank = int((expected[i] > expected[i, output.token_ids[i]]).sum()) + 1
        assert entries[0][2] == rank
        ranks.append(rank)
    assert max(ranks) > 1  # it did sample


def test_dummy_weights_need_only_a_config_and_stay_finite(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Qwen3", num_hidden_layers=12)
    for file in path.glob("*.safetensors"):
        file.unlink()
    first, second = (
        driver(path, load_format="dummy", dtype="auto", attention_backend="reference").logits(
            prompt(50)
        )
        for _ in range(2)
    )
    assert torch.isfinite(first).all()
    assert 0.1 < float(first.std()) < 10
    assert torch.equal(first, second)


def test_the_output_head_shares_the_embedding(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama", tie_word_embeddings=True)
    model = driver(path, attention_backend="reference").runner.model
    assert model.lm_head.weight is model.embed_tokens.weight
