"""GraphRunner: no switch and no interleaving changes a token.

Without a GPU the kernels run in Triton's interpreter and nothing is captured: slow, so there is one
small comparison with the plain runner. The rest needs a CUDA device.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from octavo._core import TokenIds
from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json
from octavo.engine import engine_loop
from octavo.errors import EngineDeadError
from octavo.kernels.shared_prefixes import MAX_GROUPS
from octavo.llm import LLM
from octavo.runner.cuda_graphs import (
    MIXED_ROWS,
    GraphCache,
    Shapes,
    StepShape,
    decode_sizes,
    exact_shape,
    mixed_rows,
)
from octavo.runner.gpu_sampling import GpuSampling
from octavo.runner.graphs import GraphRunner
from octavo.runner.lockstep import LockstepExchange
from octavo.runner.logprobs import processed_logits
from octavo.runner.mesh import NoExchange
from octavo.runner.request_state import RequestState
from octavo.runner.runner import ShardLostError
from octavo.runner.slots import SlotRecords
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams, Trigger
from toy_shards import assert_same, generate_with
from two_runners import each_runner

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SMALL = SHAPE | {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
# What each row of a batch may ask for.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.9, "seed": 12, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "seed": 13, "min_p": 0.05},
    {"temperature": 0.0, "logprobs": 3},
]
# And those whose logits are changed first.
ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -100.0}},
    {"temperature": 0.0, "allowed_token_ids": [3, 5, 8, 130, 199]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def prompts(count: int, longest: int = 100, vocab: int = 500) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, longest, count)
    return [{"prompt_token_ids": rng.integers(3, vocab, n).tolist()} for n in lengths]


# The same tests over several shards: OCTAVO_TEST_MESH=cuda:0,cuda:1, and OCTAVO_TEST_STAGES=2 for
# stages (bench/gpu.sh mesh).
MESH = os.environ.get("OCTAVO_TEST_MESH")
STAGES = int(os.environ.get("OCTAVO_TEST_STAGES", "1"))


def make(folder: Path, **config: Any) -> LLM:
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "mesh": MESH,
        "pipeline_parallel_size": STAGES,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
    }
    return LLM(str(folder), **(settings | config))


def tokens(llm: LLM, kinds: list[dict[str, Any]], count: int = 12, num: int = 24) -> list[Any]:
    params = [
        SamplingParams(**kinds[i % len(kinds)], max_tokens=num + i % 3, ignore_eos=True)
        for i in range(count)
    ]
    outputs = llm.generate(prompts(count), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_close(found: Any, expected: Any) -> None:
    """Log probabilities of one sample or prompt."""
    assert (found is None) == (expected is None)
    for step, other in zip(found or [], expected or [], strict=True):
        assert (step is None) == (other is None)
        assert list(step or ()) == list(other or ())
        for token in step or ():
            # Equal where both are -inf.
            assert step[token].logprob == pytest.approx(other[token].logprob, rel=0, abs=1e-4)
            assert step[token].rank == other[token].rank


# ---------------------------------------------------------------------------------------- shapes


def test_steps_are_padded_to_the_smallest_shape() -> None:
    shapes = Shapes(decode_sizes(20))
    assert decode_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert decode_sizes(64, (3, 100)) == (3, 64)
    assert decode_sizes(256) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    assert shapes.find(5, 0, 0) == StepShape(8, 0, 0)
    assert shapes.find(0, 1, 128) == StepShape(0, 1, 128)
    assert shapes.find(9, 2, 129) == StepShape(32, 4, 192)
    assert shapes.find(0, 1, 1025) is None
    assert Shapes(()).find(1, 0, 0) is None
    assert exact_shape(5, 0, 0) == StepShape(5, 0, 0)
    assert exact_shape(5, 2, 77) == StepShape(8, 2, 77)


def test_small_models_have_graphs_of_long_prefills() -> None:
    large = mixed_rows(num_layers=32, num_weights=8_000_000_000, max_rows=8192)
    assert large == MIXED_ROWS
    small = mixed_rows(num_layers=30, num_weights=135_000_000, max_rows=8192)
    assert small == (*MIXED_ROWS, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
    assert mixed_rows(num_layers=30, num_weights=135_000_000, max_rows=2047) == MIXED_ROWS
    shapes = Shapes(decode_sizes(64), small)
    assert shapes.find(3, 9, 8000) == StepShape(8, 16, 8192)
    # A step of one decode and one prompt token may be padded in both.
    widest = max(shapes.first(), key=lambda shape: shape.rows)
    assert shapes.max_padding >= widest.rows - 2


@pytest.mark.parametrize("max_num_seqs", [3, 20, 64, 200, 256, 1024])
@pytest.mark.parametrize(("num_layers", "num_weights"), [(16, 1_240_000_000), (30, 135_000_000)])
def test_a_captured_shape_stands_in_for_every_mixed_step_of_a_small_model(
    max_num_seqs: int, num_layers: int, num_weights: int
) -> None:
    rows = mixed_rows(num_layers, num_weights, 8192)
    shapes = Shapes(decode_sizes(max_num_seqs), rows)
    first = shapes.first()
    assert len(set(first)) == len(first)
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_prefills = int(rng.integers(1, min(max_num_seqs, 64) + 1))
        num_decodes = int(rng.integers(0, max_num_seqs - num_prefills + 1))
        num_rows = int(rng.integers(num_prefills, rows[-1] + 1))
        wanted = shapes.find(num_decodes, num_prefills, num_rows)
        assert wanted is not None
        held = shapes.stand_in(wanted)
        assert held in first
        assert held is not None
        assert held.decode_rows >= num_decodes
        assert held.prefill_reqs >= num_prefills
        assert held.prefill_rows >= num_rows
        assert held.prefill_rows <= max(64, 4 * num_rows)


def test_a_large_models_first_shapes_are_few() -> None:
    shapes = Shapes(decode_sizes(256), mixed_rows(32, 8_000_000_000, 8192))
    assert len(shapes.first()) < 25
    assert shapes.stand_in(StepShape(8, 16, 256)) == StepShape(32, 64, 512)
    assert shapes.stand_in(StepShape(64, 16, 256)) is None


def test_a_shape_gets_its_own_graph_once_padding_has_cost_as_much() -> None:
    graphs: GraphCache[int] = GraphCache(None)
    assert not graphs.stand_in("a", "b", 3, 10)  # there is no b
    graphs._graphs["b"] = cast(Any, None)
    assert [graphs.stand_in("a", "b", 3, 10) for _ in range(5)] == [True, True, True, False, False]
    assert graphs.stand_in("c", "b", 0, 10)


# ----------------------------------------------------------------------------------- interpreted


def both_runners(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Iterator[LLM]:
    """The model in ``folder`` behind the plain runner, then behind that of GPUs, interpreted."""
    for _ in each_runner(monkeypatch):
        settings: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_model_len": 64,
            "max_num_batched_tokens": 16,
        }
        yield make(
            folder,
            device="cpu",
            attention_backend="reference",
            threads=1,
            block_size=4,
            enforce_eager=True,
            **(settings | config),
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs everything below")
def test_interpreted_steps_choose_the_plain_runners_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    sampling: list[dict[str, Any]] = [{}, {"logprobs": 2}, ADJUSTED[0], ADJUSTED[2], ADJUSTED[3]]
    sampling.append({"bad_words": ["\x01\x02"], "min_tokens": 2, "stop_token_ids": [5]})
    sampling += [{"prompt_logprobs": 2}, {"prompt_logprobs": 0, "repetition_penalty": 1.2}]
    found = []
    for llm in both_runners(tmp_path, monkeypatch):
        params = [
            SamplingParams(**{"temperature": 0.0, **kind}, max_tokens=3, ignore_eos=True)
            for kind in sampling
        ]
        outputs = llm.generate(prompts(len(sampling), 20, 190), params, use_tqdm=False)
        found.append(outputs)
    for plain, output in zip(*found, strict=True):
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids
        assert_close(output.outputs[0].logprobs, plain.outputs[0].logprobs)
        assert_close(output.prompt_logprobs, plain.prompt_logprobs)
    with llm.trace(tmp_path / "trace.json") as trace:
        again = llm.generate(prompts(len(sampling), 20, 190)[:1], params[0], use_tqdm=False)
    assert again[0].outputs[0].token_ids == found[1][0].outputs[0].token_ids
    waits = [event for event in trace._events if event["name"] == "wait"]
    assert len(waits) >= params[0].max_tokens  # one a step
    assert isinstance(llm._engine.runner, GraphRunner)
    assert llm._engine.runner._observer is None
    scored = [output.prompt_logprobs for output in found[0][-2:]]
    assert [len(rows) for rows in scored] == [len(o.prompt_token_ids) for o in found[0][-2:]]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
def test_interpreted_steps_that_share_prefixes_choose_the_plain_runners_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prefixes of five blocks, and a request apart; answers end one after another."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(GraphRunner, "prefix_sharing", (MAX_GROUPS, 8, 8))
    groups = []
    launch = GraphRunner.launch

    def spied(self: GraphRunner, batch: Any, *rest: Any) -> Any:
        groups.append(batch.num_shared_groups)
        return launch(self, batch, *rest)

    monkeypatch.setattr(GraphRunner, "launch", spied)
    rng = np.random.default_rng(5)
    heads = [rng.integers(3, 190, 21).tolist() for _ in range(2)]
    asked = [
        {"prompt_token_ids": head + rng.integers(3, 190, own).tolist()}
        for head, own in zip(2 * heads, (3, 7, 1, 2), strict=True)
    ]
    found = []
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 64, "disable_cascade_attn": False}
    for llm in both_runners(tmp_path, monkeypatch, **settings):
        # Computed before, so that the others find them in the cache.
        llm.generate(asked[:2], SamplingParams(max_tokens=1), use_tqdm=False)
        kinds: list[dict[str, Any]] = [{"logprobs": 2}, {}, ADJUSTED[0], {}, {"min_p": 0.0}]
        params = [
            SamplingParams(**{"temperature": 0.0, **kind}, max_tokens=most, ignore_eos=True)
            for kind, most in zip(kinds, (4, 3, 4, 3, 5), strict=True)
        ]
        outputs = llm.generate([*asked, *prompts(1, 20, 190)], params, use_tqdm=False)
        found.append([output.outputs[0] for output in outputs])
    assert [one.token_ids for one in found[1]] == [one.token_ids for one in found[0]]
    assert_close(found[1][0].logprobs, found[0][0].logprobs)
    assert {0, 1, 2} <= set(groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_interpreted_steps_report_the_plain_runners_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """What --logprobs-mode has reported, of rows whose tokens do not depend on chance."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"eos_token_id": 7}))
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"logprobs": 3, "temperature": 0.5, "top_k": 1, "seed": 1},
        {"logprobs": 2, "repetition_penalty": 1.3, "logit_bias": {ord("["): 3.0}},
        {"logprobs": 2, "structured_outputs": {"regex": "[0-9]-[a-c]{1,2}"}},
        {"prompt_logprobs": 2},
    ]
    found = []
    for llm in both_runners(tmp_path, monkeypatch, logprobs_mode=mode):
        params = [SamplingParams(**{"temperature": 0.0, **kind}, max_tokens=3) for kind in kinds]
        found.append(llm.generate(prompts(len(kinds), 20, 190), params, use_tqdm=False))
    for plain, output in zip(*found, strict=True):
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids
        assert_close(output.outputs[0].logprobs, plain.outputs[0].logprobs)
        assert_close(output.prompt_logprobs, plain.prompt_logprobs)
    alone = found[1][1].outputs[0]
    for chosen, row in zip(alone.token_ids, alone.logprobs, strict=True):
        others = {one.logprob for token, one in row.items() if token != chosen}
        assert (others == {-math.inf}) is mode.startswith("processed")


# Any text, and letters from the first "a" on, which some samples come to soon. Letters are likely, so
# that what was sampled ahead would be chosen again, unless it has been counted.
AWAKENED: list[dict[str, Any]] = [
    {
        **sampling,
        "logit_bias": {ord("a"): 3.5} | dict.fromkeys(range(ord("b"), ord("z")), 3.0),
        "structured_outputs": StructuredOutputsParams(
            grammar='start: TEXT ("a" /[b-y]{4,60}/)?\nTEXT: /(?s:[^a]*)/\n',
            trigger=Trigger(("a",), False),
        ),
    }
    for sampling in (
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 4, "presence_penalty": 2.0, "frequency_penalty": 0.3},
        {"temperature": 0.7, "seed": 5},
    )
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
def test_interpreted_constraints_that_wake_up_forget_what_was_sampled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties count the tokens of the answer, and none that was given up."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    # Both draw with chances of their own.
    kinds = [kind | {"temperature": 0.0} for kind in 2 * AWAKENED]
    params = [SamplingParams(**kind, max_tokens=20, ignore_eos=True) for kind in kinds]
    plain, ahead = (
        [output.outputs[0].token_ids for output in llm.generate(asked, params, use_tqdm=False)]
        for llm in both_runners(tmp_path, monkeypatch)
        for asked in [prompts(len(params), 20, 190)]
    )
    letters = range(ord("b"), ord("z"))
    assert sum(all(token in letters for token in one[-4:]) for one in plain) > 2
    assert ahead == plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
def test_interpreted_constrained_rows_choose_the_plain_runners_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in two parts, one ahead of the host, beside rows that are free; in chunks, with all that
    a request may ask for beside a grammar."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"eos_token_id": 7}))
    schema = {"type": "array", "items": {"enum": [0, 12]}, "maxItems": 2}
    array = {"json": schema, "disable_any_whitespace": True}
    kinds: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": "[0-9]-[a-c]{1,2}"}},
        {},
        {"structured_outputs": array, "logprobs": 2},
        {"structured_outputs": array, "repetition_penalty": 1.3, "logit_bias": {ord("["): 3.0}},
        {"structured_outputs": {"choice": ["no", "nothing"]}, "prompt_logprobs": 1},
        {"logprobs": 1},
        {"structured_outputs": {"regex": "a*"}, "min_tokens": 2, "n": 2},
    ]
    found = []
    for llm in both_runners(tmp_path, monkeypatch):
        params = [SamplingParams(**{"temperature": 0.0, **kind}, max_tokens=8) for kind in kinds]
        asked = prompts(len(kinds), 20, 190)
        found.append(llm.generate(asked, params, use_tqdm=False))
    for plain, output in zip(*found, strict=True):
        for one, other in zip(output.outputs, plain.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert_close(one.logprobs, other.logprobs)
        assert_close(output.prompt_logprobs, plain.prompt_logprobs)
    texts = [output.outputs[0].text for output in found[1]]
    assert re.fullmatch("[0-9]-[a-c]{1,2}", texts[0])
    assert isinstance(json.loads(texts[2]), list)
    # Nothing to choose from ends that request alone.
    bad = SamplingParams(
        temperature=0.0, structured_outputs={"choice": ["no"]}, allowed_token_ids=[5], logprobs=1
    )
    with pytest.raises(RuntimeError, match="failed"):
        llm.generate(asked[:2], [bad, params[1]], use_tqdm=False)
    [again] = llm.generate(asked[1:2], params[1], use_tqdm=False)
    assert again.outputs[0].token_ids == found[1][1].outputs[0].token_ids


@pytest.mark.skipif(torch.cuda.is_available(), reason="the toy model is on a CPU")
def test_interpreted_shards_choose_the_tokens_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One plan for every shard; ids and log probabilities are read from rank 0."""
    expected = generate_with(GraphRunner, NoExchange(), tmp_path, monkeypatch)
    assert_same(generate_with(GraphRunner, LockstepExchange(2), tmp_path, monkeypatch), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain runner is on a CPU")
def test_interpreted_stages_choose_the_tokens_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps on their way at once, whose tokens the first stage takes from the last one's memory."""
    transformers_model(tmp_path, SMALL | {"num_hidden_layers": 2, "eos_token_id": 7})
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"structured_outputs": {"regex": "[0-9]-[a-c]{1,2}"}},
        {"repetition_penalty": 1.3, "min_tokens": 2},
    ]
    params = [SamplingParams(**{"temperature": 0.0, **kind}, max_tokens=4) for kind in kinds]
    asked = prompts(len(kinds), 20, 190)
    batches = [(asked, params), (asked[:1], params[0])]
    found = []
    for config in ({}, {"mesh": "cpu,cpu", "pipeline_parallel_size": 2}):
        *_, llm = both_runners(tmp_path, monkeypatch, load_format="auto", **config)
        found.append([out for batch in batches for out in llm.generate(*batch, use_tqdm=False)])
    runner = llm._engine.runner
    assert runner.max_in_flight == 3
    # Where nothing can be planned the memory is not used up: other steps are on their way in theirs.
    assert runner.next_staging() is runner.next_staging()
    for output, other in zip(*found, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert_close(output.outputs[0].logprobs, other.outputs[0].logprobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the toy model is on a CPU")
def test_a_lost_shard_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = LockstepExchange(2)
    monkeypatch.setattr(exchange, "has_lost_a_rank", lambda: True)
    with pytest.raises(EngineDeadError) as caught:
        generate_with(GraphRunner, exchange, tmp_path, monkeypatch)
    assert isinstance(caught.value.__cause__, ShardLostError)


# -------------------------------------------------------------------------------------- switches


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kinds", [KINDS, ADJUSTED, KINDS + ADJUSTED])
def test_no_switch_changes_a_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[dict[str, Any]]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(GraphRunner, "steps_ahead", 0)
        expected = tokens(make(folder, enforce_eager=True), kinds)
        assert tokens(make(folder), kinds) == expected, "graphs"
    assert tokens(make(folder, enforce_eager=True), kinds) == expected, "run-ahead"
    llm = make(folder)
    assert tokens(llm, kinds) == expected, "both"
    assert tokens(llm, kinds) == expected, "prefix hits"
    assert tokens(make(folder, max_num_batched_tokens=16), kinds) == expected, "chunks"
    assert tokens(make(folder, max_num_seqs=3), kinds) == expected, "other batches"
    small = make(folder, num_gpu_blocks_override=(256 + 160) // 16, max_num_seqs=8)
    assert tokens(small, kinds) == expected, "preemption"
    assert small._engine.core.stats()["num_preemptions"] > 0


@pytest.mark.gpu
@on_gpu
def test_graphs_of_shared_prefixes_choose_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prefixes of eight blocks; twice, so that their graphs are captured and replayed."""
    monkeypatch.setattr(GraphRunner, "prefix_sharing", (MAX_GROUPS, 16, 16))
    rng = np.random.default_rng(5)
    heads = [rng.integers(3, 500, 130).tolist() for _ in range(2)]
    asked = [
        {"prompt_token_ids": [*heads[n % 2], *rng.integers(3, 500, 1 + n).tolist()]}
        for n in range(8)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = []
    for is_disabled in (True, False):
        llm = make(folder, disable_cascade_attn=is_disabled)
        llm.generate(asked[:2], SamplingParams(max_tokens=1), use_tqdm=False)
        for _ in range(2):
            outputs = llm.generate(asked, params, use_tqdm=False)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
        runner = llm._engine.runner
        assert isinstance(runner, GraphRunner)
        shapes = [shape for shape, _ in runner.mesh.lead.graphs._graphs]
        assert any(shape.shares for shape in shapes) is not is_disabled
    assert found[1:] == 3 * found[:1]


@pytest.mark.gpu
@on_gpu
def test_graphs_captured_in_pauses_change_no_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause comes after every few requests, whose keys and values stay cached meanwhile."""
    kinds = KINDS + ADJUSTED
    expected = tokens(make(folder), kinds)
    monkeypatch.setattr(engine_loop.EngineLoop, "finish_warm_up", lambda self: None)
    llm = make(folder)
    runner = llm._engine.runner
    assert isinstance(runner, GraphRunner)
    at_once = len(runner.mesh.lead.graphs)
    while runner.idle_work():
        assert tokens(llm, kinds) == expected
        runner.idle_work()
    assert len(runner.mesh.lead.graphs) > at_once
    assert tokens(llm, kinds) == expected


@pytest.mark.gpu
@on_gpu
def test_experts_in_a_graph_choose_the_same_tokens(tmp_path: Path) -> None:
    experts = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    (tmp_path / "config.json").write_text(
        json.dumps(SHAPE | experts | {"num_experts_per_tok": 2, "sliding_window": None})
    )
    llm = make(tmp_path)
    assert tokens(llm, KINDS) == tokens(make(tmp_path, enforce_eager=True), KINDS)
    runner = llm._engine.runner
    assert isinstance(runner, GraphRunner)
    assert len(runner.mesh.lead.graphs) > 0


# And those that follow a grammar. The dummy tokenizer's ids below 256 are bytes.
CONSTRAINED: list[dict[str, Any]] = [
    {"temperature": 0.0, "structured_outputs": {"regex": "[0-9]-[a-c]{4,30}"}},
    {"temperature": 1.0, "seed": 21, "structured_outputs": {"json": {"type": "object"}}},
    {"temperature": 0.0, "structured_outputs": {"choice": ["no", "nothing at all"]}},
    {"temperature": 0.0, "structured_outputs": {"regex": "a{3,9}b"}, "repetition_penalty": 1.2},
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kinds", [CONSTRAINED, CONSTRAINED + KINDS + ADJUSTED])
def test_constrained_rows_in_graphs_choose_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[dict[str, Any]]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(GraphRunner, "steps_ahead", 0)
        expected = tokens(make(folder, enforce_eager=True), kinds)
    llm = make(folder)
    for _ in range(3):  # kernel by kernel, captured, replayed
        assert tokens(llm, kinds) == expected
    assert tokens(make(folder, max_num_batched_tokens=16), kinds) == expected, "chunks"
    assert tokens(make(folder, max_num_seqs=3), kinds) == expected, "other batches"
    runner = llm._engine.runner
    assert isinstance(runner, GraphRunner)
    # Rows without a grammar have the tokens that they have among others without.
    free = [{"temperature": 0.0} if kind in CONSTRAINED else kind for kind in kinds]
    alone = tokens(llm, free)
    for row, one in enumerate(alone):
        if kinds[row % len(kinds)] not in CONSTRAINED:
            assert one == expected[row], row
    # A step with log probabilities, which are of the logits before, has no graph of choices.
    has_logprobs = any("logprobs" in kind for kind in kinds)
    assert has_logprobs or len(runner.mesh.lead.choice_graphs) > 0


def test_a_slot_that_is_written_anew_counts_no_token_that_was_given_up() -> None:
    sampling = GpuSampling(2, 50, 0, torch.device("cpu"))
    params = SamplingParams(presence_penalty=0.5)
    state = RequestState(
        request_id=0, params=params, prompt_token_ids=[1], max_tokens=9, arrival_s=0.0
    )
    sampling.admit(1, state, 0)
    [(row, first)] = sampling.needs(np.array([1], np.int32)).tracked
    assert row == 0
    first += [7, 7]
    [(_, ahead)] = sampling.needs(np.array([1], np.int32)).tracked
    sampling.admit(1, state, 2)
    ahead.append(9)
    sampling.admit(1, state, 2)
    assert state.output_token_ids == [7, 7]
    counts = sampling.adjusted.token_counts
    assert counts is not None
    assert counts[1].nonzero().tolist() == [[7]]
    assert counts[1, 7] == 2


@pytest.mark.gpu
@on_gpu
def test_a_constraint_that_wakes_up_forgets_what_was_sampled_ahead(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties count the tokens of the answer, and none that was given up."""
    with monkeypatch.context() as patch:
        patch.setattr(GraphRunner, "steps_ahead", 0)
        expected = tokens(make(folder, enforce_eager=True), AWAKENED)
    letters = range(ord("b"), ord("z"))
    assert sum(all(token in letters for token in one[-8:]) for one in expected) > 3
    llm = make(folder)
    for _ in range(3):
        assert tokens(llm, AWAKENED) == expected
    assert tokens(make(folder, max_num_seqs=3), AWAKENED) == expected, "other batches"


@pytest.mark.gpu
@on_gpu
def test_bad_words_of_several_tokens_never_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(folder)
    [free] = llm.generate(
        prompts(1), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    said = free.outputs[0].token_ids
    pair = tuple(said[3:5])
    monkeypatch.setattr(engine_loop, "encode_bad_words", lambda tokenizer, words: (pair,))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, bad_words=["x"])
    [held] = llm.generate(prompts(1), params, use_tqdm=False)
    chosen = held.outputs[0].token_ids
    assert pair not in itertools.pairwise(chosen)
    first = next(i for i in range(1, 12) if tuple(said[i - 1 : i + 1]) == pair)
    assert chosen[:first] == said[:first]
    assert llm._engine.core.stats()["num_in_flight"] == 0


# --------------------------------------------------------------------------------------- hazards


@pytest.mark.gpu
@on_gpu
def test_an_abort_at_any_step_leaves_the_neighbours_alone(folder: Path) -> None:
    llm = make(folder)
    expected = tokens(llm, KINDS, count=4, num=10)
    loop = llm._engine
    for step in range(9):
        params = [
            SamplingParams(**KINDS[i], max_tokens=10 + i % 3, ignore_eos=True) for i in range(4)
        ]
        ids = []
        for prompt, sampling in zip(prompts(4), params, strict=True):
            samples = loop.prepare(TokenIds(prompt["prompt_token_ids"]), sampling)
            loop.submit(samples)
            ids.append(samples[0].request_id)
        for _ in range(step):
            loop.step()
        loop.abort([ids[1]])
        found: dict[int, list[int]] = {i: [] for i in ids}
        while loop.step() or loop.core.has_work():
            loop.core.check_integrity()
        for delta in loop.core.outbox.drain():
            found[delta.request_id] += delta.token_ids
        for row in (0, 2, 3):
            assert found[ids[row]] == expected[row], (step, row)


@pytest.mark.gpu
@on_gpu
def test_a_stop_while_a_step_is_in_flight_frees_its_slot(folder: Path) -> None:
    llm = make(folder, max_num_seqs=2)
    expected = tokens(llm, KINDS[:1], count=6, num=10)
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[row[4]])
        for row in expected
    ]
    outputs = llm.generate(prompts(6), params, use_tqdm=False)
    for row, output in zip(expected, outputs, strict=True):
        end = row.index(row[4]) + 1
        assert list(output.outputs[0].token_ids)[: end - 1] == row[: end - 1]
        assert output.outputs[0].finish_reason == "stop"


# ---------------------------------------------------------------------------------- transformers


def transformers_model(folder: Path, shape: dict[str, Any] = SHAPE) -> Any:
    """A random model, saved in the folder with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(dummy_tokenizer_json(shape["vocab_size"]))
    return model


@pytest.mark.gpu
@on_gpu
def test_greedy_tokens_are_transformers(tmp_path: Path) -> None:
    model = transformers_model(tmp_path).cuda()
    llm = make(tmp_path, load_format="auto")
    asked = prompts(8)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    outputs = llm.generate(asked, params, use_tqdm=False)
    for prompt, output in zip(asked, outputs, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"]], device="cuda")
        with torch.no_grad():
            reference = model.generate(
                ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, eos_token_id=None
            )
        assert list(output.outputs[0].token_ids) == reference[0, ids.shape[1] :].tolist()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("config", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 48}])
def test_prompt_logprobs_are_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """Beside requests that ask for none, one step ahead of the host, in chunks of few logits."""
    model = transformers_model(tmp_path).cuda()
    llm = make(tmp_path, load_format="auto", **config)
    runner = llm._engine.runner
    assert isinstance(runner, GraphRunner)
    for shard in runner.mesh.shards:
        shard.prompt_scorer._max_rows = 20
    asked = prompts(24)
    kinds: list[dict[str, Any]] = [
        {"prompt_logprobs": 3, "max_tokens": 0},
        {"max_tokens": 30},
        {"prompt_logprobs": 2, "max_tokens": 20, "frequency_penalty": 0.5, "logprobs": 1},
    ]
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(len(asked))
    ]
    for _ in range(2):
        outputs = llm.generate(asked, params, use_tqdm=False)
        for prompt, sampling, output in zip(asked, params, outputs, strict=True):
            rows = output.prompt_logprobs
            assert (rows is None) == (sampling.prompt_logprobs is None)
            if rows is None:
                continue
            ids = prompt["prompt_token_ids"]
            assert len(rows) == len(ids)
            with torch.no_grad():
                logits = model(torch.tensor([ids], device="cuda")).logits[0]
            expected = logits.log_softmax(-1).cpu()
            for token, row, entry in zip(ids[1:], expected, rows[1:], strict=False):
                assert entry is not None
                best = row.topk(sampling.prompt_logprobs).indices.tolist()
                assert set(entry) == {token, *best}
                for candidate in entry:
                    assert abs(entry[candidate].logprob - float(row[candidate])) < 1e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("eager", [False, True])
def test_processed_logprobs_are_the_draws_of_the_raw_ones(folder: Path, eager: bool) -> None:
    """Every token's, of both modes: the same tokens come, and the filters' arithmetic between."""
    num = SHAPE["vocab_size"]
    kinds = [kind | {"logprobs": num} for kind in (*KINDS, *ADJUSTED[3:])]
    rows = {}
    for mode in ("raw_logprobs", "processed_logprobs"):
        llm = make(folder, max_logprobs=-1, logprobs_mode=mode, enforce_eager=eager)
        wanted = [SamplingParams(**kind, max_tokens=6, ignore_eos=True) for kind in kinds]
        outputs = llm.generate(prompts(len(kinds)), wanted, use_tqdm=False)
        rows[mode] = [output.outputs[0] for output in outputs]
        del llm
    for kind, raw, processed in zip(kinds, *rows.values(), strict=True):
        assert processed.token_ids == raw.token_ids
        records = SlotRecords(1)
        state = RequestState(
            request_id=0,
            params=SamplingParams(**kind),
            arrival_s=0.0,
            prompt_token_ids=[0],
            max_tokens=1,
            seed=1,
        )
        records.write(0, state)
        for token, before, after in zip(
            raw.token_ids, raw.logprobs, processed.logprobs, strict=True
        ):
            logits = torch.tensor([[before[i].logprob for i in range(num)]])
            if allowed := kind.get("allowed_token_ids"):
                banned = [i for i in range(num) if i not in allowed]
                logits[0, banned] = -math.inf
            expected = processed_logits(logits, records.rows, torch.tensor([token]))
            expected = expected.log_softmax(-1)[0]
            found = torch.tensor([after[i].logprob for i in range(num)])
            # A token at a filter's very bound may be on either side of it.
            differs = (found - expected).abs().nan_to_num(0.0) > 1e-3
            assert differs.sum() <= 1, (kind, differs.nonzero())


@pytest.mark.gpu
@on_gpu
def test_bfloat16_is_as_exact_as_transformers(tmp_path: Path) -> None:
    """The mean error of log probabilities against float32, over every token of the vocabulary."""
    model = transformers_model(tmp_path).cuda()
    llm = make(tmp_path, load_format="auto", dtype="bfloat16", max_logprobs=512)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=512)
    asked = prompts(8)
    outputs = llm.generate(asked, params, use_tqdm=False)
    rounded = _copy_in_bfloat16(model)
    ours, theirs = [], []
    for prompt, output in zip(asked, outputs, strict=True):
        sample = output.outputs[0]
        ids = torch.tensor([prompt["prompt_token_ids"] + list(sample.token_ids)], device="cuda")
        start = len(prompt["prompt_token_ids"]) - 1
        with torch.no_grad():
            exact = model(ids).logits[0, start:-1].double().log_softmax(-1).cpu()
            bf16 = rounded(ids).logits[0, start:-1].double().log_softmax(-1).cpu()
        mine = torch.empty_like(exact)
        for row, step in enumerate(sample.logprobs):
            for token, logprob in step.items():
                mine[row, token] = logprob.logprob
        ours.append((mine - exact).abs().mean().item())
        theirs.append((bf16 - exact).abs().mean().item())
    assert np.mean(ours) <= 1.2 * np.mean(theirs), (np.mean(ours), np.mean(theirs))


def _copy_in_bfloat16(model: Any) -> Any:
    return copy.deepcopy(model).to(torch.bfloat16)
