"""vLLM's ways to drive an engine: mutable settings, queued calls, LLMEngine, AsyncLLM, EngineArgs."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import octavo
import octavo.metrics_reader
from octavo.config import EngineConfig, ProfilerConfig
from octavo.engine.arg_utils import AsyncEngineArgs, EngineArgs
from octavo.engine.async_llm_engine import AsyncLLM
from octavo.engine.engine import AsyncEngine
from octavo.engine.llm_engine import LLMEngine
from octavo.errors import EngineDeadError, InvalidParameterError, UnsupportedParameterError
from octavo.exceptions import VLLMValidationError
from octavo.llm import LLM
from octavo.lora.request import LoRARequest
from octavo.outputs import CompletionOutput, EmbeddingRequestOutput, Logprob, RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.utils import FlexibleArgumentParser
from octavo.utils.print_utils import print_embeddings

CONFIG: dict[str, Any] = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4}
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [1, 2, 3]]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **fields})


def ids(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# ------------------------------------------------------------------------------ LLM


def test_settings_may_be_changed_until_they_are_given(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    settings = llm.get_default_sampling_params()
    settings.max_tokens, settings.ignore_eos = 3, True
    assert ids(llm.generate(PROMPTS, settings, use_tqdm=False)) == [alone(p, 3) for p in PROMPTS]
    settings.max_tokens = 5
    # What is queued has the values of its time.
    queued = llm.enqueue(PROMPTS[:1], settings)
    settings.max_tokens = 1
    settings.stop_token_ids = [alone(PROMPTS[0], 1)[0]]  # type: ignore[assignment]
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert output.request_id == queued[0]
    assert output.outputs[0].token_ids == alone(PROMPTS[0], 5)
    assert llm.get_default_sampling_params().max_tokens == 16


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", -1), ("top_p", 7), ("stop", 5), ("seed", "x"), ("n", 0)]
)
def test_a_changed_setting_is_checked(fake_model: Any, alone: Any, field: str, value: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    settings = params()
    setattr(settings, field, value)
    with pytest.raises(InvalidParameterError, match=rf"^{field} must be"):
        llm.generate(PROMPTS, settings, use_tqdm=False)
    assert ids(llm.generate(PROMPTS, params(), use_tqdm=False)) == [alone(p, 4) for p in PROMPTS]


def test_settings_per_prompt_keep_their_order(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    one, two = params(max_tokens=2), params(max_tokens=3)
    found = ids(llm.generate(PROMPTS, [one, two, one], use_tqdm=False))
    assert found == [alone(p, n) for p, n in zip(PROMPTS, (2, 3, 2), strict=True)]


def test_what_is_enqueued_waits(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    first = llm.enqueue(PROMPTS[:2], params())
    # Other calls go on meanwhile.
    assert ids(llm.generate(PROMPTS, params(), use_tqdm=False)) == [alone(p, 4) for p in PROMPTS]
    second = llm.enqueue(PROMPTS[2], params(max_tokens=2))
    with pytest.raises(InvalidParameterError):
        llm.enqueue([[]], params())
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == [*first, *second]
    assert ids(outputs) == [alone(PROMPTS[0], 4), alone(PROMPTS[1], 4), alone(PROMPTS[2], 2)]
    assert llm.wait_for_completion(use_tqdm=False) == []
    llm.enqueue(PROMPTS, params(), None, 1, False, {"truncate_prompt_tokens": 2})
    with pytest.raises(TypeError, match="EmbeddingRequestOutput"):
        llm.wait_for_completion(EmbeddingRequestOutput)
    outputs = llm.wait_for_completion((EmbeddingRequestOutput, RequestOutput), use_tqdm=False)
    assert ids(outputs) == [alone(p[-2:], 4) for p in PROMPTS]


def test_priorities(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    expected = [alone(p, 4) for p in PROMPTS]
    for priority in (None, 0, 1, [0, 0, 0], [2, 2, 2]):
        assert ids(llm.generate(PROMPTS, params(), priority=priority, use_tqdm=False)) == expected
    for wrong in ([], [0, 0]):
        with pytest.raises(VLLMValidationError, match="priorities for 3 prompts"):
            llm.generate(PROMPTS, params(), priority=wrong)
    # Without a policy of priorities requests run as they came.
    assert ids(llm.generate(PROMPTS, params(), priority=[2, 0, 1], use_tqdm=False)) == expected
    llm = LLM(**CONFIG, scheduling_policy="priority", max_num_batched_tokens=8)
    one_at_a_time = [[n] * 6 for n in range(1, 6)]
    outputs = llm.generate(one_at_a_time, params(), priority=[5, 4, 3, 2, 1], use_tqdm=False)
    assert ids(outputs) == [alone(p, 4) for p in one_at_a_time]
    waited = [output.metrics.queue_s for output in outputs if output.metrics is not None]
    assert waited == sorted(waited, reverse=True)


def test_prompts_may_be_cut(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    long = list(range(1, 200))
    [output] = llm.generate([long], params(truncate_prompt_tokens=6), use_tqdm=False)
    assert output.prompt_token_ids == long[-6:]
    assert output.outputs[0].token_ids == alone(long[-6:], 4)
    [output] = llm.generate(
        [long], params(), tokenization_kwargs={"truncate_prompt_tokens": 5}, use_tqdm=False
    )
    assert output.prompt_token_ids == long[-5:]
    [output] = llm.generate([long], params(truncate_prompt_tokens=-1), use_tqdm=False)
    assert len(output.prompt_token_ids) == 63
    for wrong in ({"truncation": True}, {"max_length": 4}):
        with pytest.raises(UnsupportedParameterError, match="tokenization_kwargs"):
            llm.generate([long], params(), tokenization_kwargs=wrong)
    with pytest.raises(InvalidParameterError, match="truncate_prompt_tokens must be"):
        llm.generate([long], params(), tokenization_kwargs={"truncate_prompt_tokens": 0})


def test_what_octavo_has_not_is_refused(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    with pytest.raises(UnsupportedParameterError, match="no LoRA"):
        llm.generate(PROMPTS, params(), lora_request=object())  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="no LoRA"):
        LoRARequest("name", 1, "path")
    for call in (llm.sleep, llm.wake_up, lambda: llm.collective_rpc("method")):
        with pytest.raises(NotImplementedError, match="octavo"):
            call()


def test_prefixes_are_forgotten_and_counted(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    prompt = list(range(1, 20))

    def cached() -> int:
        return llm.generate([prompt], params(), use_tqdm=False)[0].num_cached_tokens

    assert (cached(), cached()) == (0, 16)
    assert llm.reset_prefix_cache()
    assert cached() == 0
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    hits = metrics["vllm:prefix_cache_hits"]
    assert isinstance(hits, octavo.metrics_reader.Counter)
    assert hits.value == 16
    assert hits.labels == {"model_name": "fake", "engine": "0"}
    ttft = metrics["vllm:time_to_first_token_seconds"]
    assert isinstance(ttft, octavo.metrics_reader.Histogram)
    assert ttft.count == ttft.buckets["+Inf"] == 3
    running = metrics["vllm:num_requests_running"]
    assert isinstance(running, octavo.metrics_reader.Gauge)
    assert running.value == 0


@pytest.mark.parametrize("typed", [False, True])
def test_profiles(fake_model: Any, alone: Any, tmp_path: Path, typed: bool) -> None:
    fake_model()
    folder = tmp_path / "profiles"
    wanted: dict[str, Any] = {"profiler": "torch", "torch_profiler_dir": str(folder)}
    llm = LLM(**CONFIG, profiler_config=ProfilerConfig(**wanted) if typed else wanted)
    step = llm._engine.step
    with pytest.raises(RuntimeError, match="no profile"):
        llm.stop_profile()
    for prefix in (None, "mine"):
        llm.start_profile(prefix)
        with pytest.raises(RuntimeError, match="already"):
            llm.start_profile()
        found = ids(llm.generate(PROMPTS, params(), use_tqdm=False))
        assert found == [alone(p, 4) for p in PROMPTS]
        llm.stop_profile()
    assert sorted(file.name for file in folder.iterdir()) == ["mine-2.json", "octavo-1.json"]
    events = json.loads((folder / "mine-2.json").read_text())["traceEvents"]
    assert {"schedule", "launch", "collect", "update"} <= {event["name"] for event in events}
    assert llm._engine.step == step


def test_a_profile_has_every_step() -> None:
    with pytest.raises(ValueError, match=r"profiler_config.max_iterations must be 0"):
        LLM(**CONFIG, profiler_config={"max_iterations": 3})
    with pytest.raises(ValueError, match=r"profiler_config.delay_iterations must be 0"):
        ProfilerConfig(delay_iterations=1)


def test_vectors_are_shown_by_their_first_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_embeddings([0.5, 1.0, 2.0, 3.0, 4.0])
    print_embeddings([0.25], prefix="Reward")
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["Embeddings: [0.5, 1.0, 2.0, 3.0, ...] (size=5)", "Reward: [0.25] (size=1)"]


def test_a_progress_bar_of_one_s_own(fake_model: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    made: list[Any] = []

    class Bar:
        def __init__(self, total: int, desc: str) -> None:
            self.total, self.done = total, 0
            made.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self) -> None:
            self.done += 1

    llm.generate(PROMPTS, params(), use_tqdm=Bar)
    assert [(bar.total, bar.done) for bar in made] == [(3, 3)]


def test_small_things_of_outputs() -> None:
    assert Logprob(-1.0) == Logprob(-1.0, None, None)
    assert not CompletionOutput(0).finished()
    assert CompletionOutput(0, finish_reason="stop").finished()
    assert CompletionOutput(0).lora_request is None


# ------------------------------------------------------------------------ LLMEngine


def make_engine(fake_model: Any, **config: Any) -> LLMEngine:
    fake_model(**config)
    return LLMEngine.from_engine_args(EngineArgs(model="m", **CONFIG))


def run(engine: LLMEngine) -> dict[str, list[Any]]:
    """Every request's outputs, as they looked when they came."""
    seen: dict[str, list[Any]] = {}
    for _ in range(200):
        if not engine.has_unfinished_requests():
            return seen
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(
                ([list(one.token_ids) for one in output.outputs], output.finished)
            )
    raise AssertionError("it does not end")


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_an_engine_that_is_stepped(fake_model: Any, alone: Any, max_in_flight: int) -> None:
    engine = make_engine(fake_model, max_in_flight=max_in_flight)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, params())
    assert engine.get_num_unfinished_requests() == 3
    with pytest.raises(InvalidParameterError, match="request_id '0' is taken"):
        engine.add_request("0", [1], params())
    seen = run(engine)
    for number, prompt in enumerate(PROMPTS):
        expected = alone(prompt, 4)
        assert [found for [found], _ in seen[str(number)]] == [expected[: n + 1] for n in range(4)]
        assert [finished for _, finished in seen[str(number)]] == [False, False, False, True]
    assert engine.step() == []


def test_kinds_of_outputs(fake_model: Any, alone: Any) -> None:
    engine = make_engine(fake_model)
    kinds = {kind.name: params(output_kind=kind) for kind in RequestOutputKind}
    for name, settings in kinds.items():
        engine.add_request(name, PROMPTS[0], settings)
    seen = run(engine)
    expected = alone(PROMPTS[0], 4)
    assert [found for [found], _ in seen["DELTA"]] == [[one] for one in expected]
    assert [found for [found], _ in seen["CUMULATIVE"]] == [expected[: n + 1] for n in range(4)]
    assert seen["FINAL_ONLY"] == [([expected], True)]


def test_an_aborted_request_leaves_nothing(fake_model: Any, alone: Any) -> None:
    engine = make_engine(fake_model)
    engine.add_request("gone", PROMPTS[0], params(max_tokens=30, n=2))
    engine.add_request("stays", PROMPTS[1], params())
    engine.step()
    engine.abort_request(["gone", "unknown"])
    assert engine.get_num_unfinished_requests() == 1
    assert list(run(engine)) == ["stays"]
    engine.add_request("gone", PROMPTS[0], params(max_tokens=30))
    engine.step()
    engine.abort_request("gone")
    assert not engine.has_unfinished_requests()
    assert engine._loop.core.num_unfinished() == 0
    assert engine._loop.core.outbox.drain() == []
    assert engine.reset_prefix_cache()
    engine._loop.core.check_integrity()


def test_an_interrupted_step_ends_what_runs(
    fake_model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(fake_model)
    loop = engine._loop
    engine.add_request("a", PROMPTS[0], params())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.runner, "launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert not engine.has_unfinished_requests()
    assert not loop.core.has_work()
    loop.core.check_integrity()
    engine.add_request("a", PROMPTS[1], params())
    assert run(engine)["a"][-1] == ([alone(PROMPTS[1], 4)], True)


def test_a_forked_child_is_refused(fake_model: Any) -> None:
    engine = make_engine(fake_model)
    engine.add_request("a", PROMPTS[0], params())
    engine._pid += 1
    for call in (engine.step, lambda: engine.add_request("b", PROMPTS[0], params())):
        with pytest.raises(RuntimeError, match="forked child"):
            call()


def test_an_llm_and_its_engine_do_not_mix(fake_model: Any, alone: Any) -> None:
    fake_model()
    llm = LLM(**CONFIG)
    llm.llm_engine.add_request("a", PROMPTS[0], params())
    assert not llm.llm_engine.reset_prefix_cache()
    with pytest.raises(RuntimeError, match="llm_engine has unfinished requests"):
        llm.generate(PROMPTS, params())
    run(llm.llm_engine)
    assert ids(llm.generate(PROMPTS, params(), use_tqdm=False)) == [alone(p, 4) for p in PROMPTS]
    assert llm.model_config.max_model_len == 64
    assert llm.model_config.get_vocab_size() == 1000
    assert llm.llm_engine.model_config.runner_type == "generate"


# ------------------------------------------------------------------------- AsyncLLM


def test_an_async_engine_s_kinds_of_outputs(fake_model: Any, alone: Any) -> None:
    fake_model()
    expected = alone(PROMPTS[0], 4)

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model="m", **CONFIG))

        async def outputs(kind: RequestOutputKind, **fields: Any) -> list[Any]:
            return [
                ([(one.index, list(one.token_ids)) for one in output.outputs], output.finished)
                async for output in engine.generate(
                    prompt=PROMPTS[0],
                    sampling_params=params(output_kind=kind, **fields),
                    request_id=kind.name,
                )
            ]

        deltas = await outputs(RequestOutputKind.DELTA)
        assert [one for [(_, found)], _ in deltas for one in found] == expected
        assert [finished for _, finished in deltas] == [False] * (len(deltas) - 1) + [True]
        so_far = await outputs(RequestOutputKind.CUMULATIVE)
        assert so_far[-1] == ([(0, expected)], True)
        assert await outputs(RequestOutputKind.FINAL_ONLY) == [([(0, expected)], True)]
        both = await outputs(RequestOutputKind.DELTA, n=2)
        for index in (0, 1):
            news = [one for [(which, ids)], _ in both if which == index for one in ids]
            assert news == expected
        assert both[-1][1]
        assert not any(finished for _, finished in both[:-1])
        [last] = await outputs(RequestOutputKind.FINAL_ONLY, n=2)
        assert last == ([(0, expected), (1, expected)], True)
        engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_changes_after_the_call_do_not_reach_the_request(fake_model: Any, alone: Any) -> None:
    fake_model()

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(**CONFIG))
        await engine.start()
        settings = params(max_tokens=12, output_kind=RequestOutputKind.DELTA)
        found: list[int] = []
        async for output in engine.generate(PROMPTS[0], settings):
            found += output.outputs[0].token_ids
            settings.max_tokens = 2
            settings.stop_token_ids = (alone(PROMPTS[0], 8)[-1],)
        assert found == alone(PROMPTS[0], 12)
        settings.n = 0
        with pytest.raises(InvalidParameterError, match="n must be"):
            async for _ in engine.generate(PROMPTS[0], settings):
                pass
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_requests_end_by_their_names(fake_model: Any, alone: Any) -> None:
    # Long enough not to end by itself.
    fake_model(num_blocks=2048)
    config = {**CONFIG, "max_model_len": 4096}

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model="m", **config))

        async def last(request_id: str, most: int) -> Any:
            found = None
            async for output in engine.generate(PROMPTS[0], params(max_tokens=most), request_id):
                found = output
                if request_id == "gone":
                    await engine.abort(["gone", "unknown"])
            return found

        gone, stays = await asyncio.gather(last("gone", 4000), last("stays", 8))
        assert gone.outputs[0].finish_reason == "abort"
        assert len(gone.outputs[0].token_ids) < 4000
        assert stays.outputs[0].token_ids == alone(PROMPTS[0], 8)
        assert engine.engine._named == {}
        assert engine.is_running
        await engine.check_health()
        assert await engine.reset_prefix_cache()
        assert any(metric.name == "vllm:generation_tokens" for metric in engine.get_metrics())
        assert engine.model_config.max_model_len == 4096
        with pytest.raises(UnsupportedParameterError, match="no LoRA"):
            async for _ in engine.generate([1], params(), "x", lora_request=object()):  # type: ignore[arg-type]
                pass
        engine.shutdown()
        assert engine.is_stopped
        with pytest.raises(EngineDeadError):
            async for _ in engine.generate([1], params(), "x"):
                pass
        with pytest.raises(EngineDeadError):
            await engine.check_health()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_shutdown_ends_what_runs(fake_model: Any) -> None:
    fake_model(num_blocks=2048)
    config = {**CONFIG, "max_model_len": 4096}

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model="m", **config))
        outputs = engine.generate([1, 2], params(max_tokens=4000), "x")
        await anext(outputs)
        engine.shutdown()
        with pytest.raises(EngineDeadError):
            [_ async for _ in outputs]

    asyncio.run(asyncio.wait_for(main(), 30))


# ----------------------------------------------------------------------- EngineArgs


def test_arguments_make_an_llm(fake_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake_model()
    args = EngineArgs(model="m", swap_space=4, tokenizer_mode="auto", enable_lora=False, **CONFIG)
    assert args.create_engine_config() == EngineConfig(model="m", **CONFIG)
    llm = LLM(**dataclasses.asdict(args))
    assert llm.config == EngineConfig(model="m", **CONFIG)
    assert "EngineArgs(swap_space=4) changes nothing here" in caplog.text
    assert "enable_lora" not in caplog.text
    with pytest.raises(ValueError, match=r"^EngineArgs\(enable_lora=True\): octavo has no LoRA"):
        EngineArgs(model="m", enable_lora=True).create_engine_config()
    with pytest.raises(TypeError, match="frobnicate"):
        EngineArgs(model="m", frobnicate=1)
    async_args = AsyncEngineArgs("m", enable_log_requests=True, disable_log_stats=True)
    assert async_args.create_engine_config() == EngineConfig(model="m")


def test_values_of_other_types(fake_model: Any) -> None:
    import numpy as np
    import torch

    fake_model()
    llm = LLM(
        dtype=torch.float32,
        served_model_name="one",
        max_num_seqs=np.int64(4),
        max_model_len="64",
        cudagraph_capture_sizes=[1, 2],
        enable_prefix_caching=None,
        kv_cache_memory_bytes="1G",
        compilation_config={"level": 3},
        limit_mm_per_prompt={},
        cpu_offload_gb=0,
        swap_space=0,
        disable_log_stats=True,
        attention_backend="FLASH_ATTN",
        distributed_executor_backend="mp",
    )
    assert llm.config == EngineConfig(
        dtype="float32",
        served_model_name=("one",),
        max_num_seqs=4,
        max_model_len=64,
        cuda_graph_sizes=(1, 2),
        kv_cache_memory_bytes=2**30,
    )
    with pytest.raises(ValueError, match=r"^LLM\(cpu_offload_gb=4\): octavo keeps weights"):
        LLM(cpu_offload_gb=4)


def test_arguments_from_the_command_line(fake_model: Any) -> None:
    fake_model()
    parser = FlexibleArgumentParser()
    assert EngineArgs.add_cli_args(parser) is parser
    parser.set_defaults(model="m", enforce_eager=True)
    parser.add_argument_group("Sampling").add_argument("--max-tokens", type=int)
    words = "--max_model_len 64 --block-size 4 --swap-space 4 --max-tokens 3 --runner auto"
    args = vars(parser.parse_args(words.split()))
    assert args.pop("max_tokens") == 3
    expected = EngineConfig(model="m", enforce_eager=True, max_model_len=64, block_size=4)
    assert LLM(**args).config == expected
    space = argparse.Namespace(**args, unrelated=1)
    assert EngineArgs.from_cli_args(space).create_engine_config() == expected


def test_names_at_the_top() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    from octavo.sampling_params import BeamSearchParams
    from octavo.v1.engine.async_llm import AsyncLLM as there
    from octavo.v1.engine.llm_engine import LLMEngine as stepped
    from octavo.v1.metrics.reader import Counter

    assert there is AsyncLLM is octavo.AsyncLLMEngine
    assert stepped is octavo.LLMEngine
    assert BeamSearchParams is octavo.BeamSearchParams
    assert Counter is octavo.metrics_reader.Counter


def test_the_document_names_what_there_is() -> None:
    """docs/python.md: each name of the first column, methods of the class before them."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        owner: Any = None
        for name in re.findall(r"`([\w.]+)", row):
            first, _, rest = name.removeprefix("octavo.").partition(".")
            if name.startswith("octavo."):
                module = importlib.import_module(f"octavo.{first}")
                assert hasattr(module, rest), name
            elif first == "LoRARequest":
                assert LoRARequest
            elif first in octavo.__all__:
                owner = getattr(octavo, first)
                assert not rest or hasattr(owner, rest), name
            else:
                assert hasattr(owner, name) or name in ("llm_engine", "vllm"), name
