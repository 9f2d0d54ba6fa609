"""The offline benchmarks over an LLM that answers at once: what they ask for, what they report."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from octavo.bench import BENCHMARKS, add_subcommands, offline


class FakeLLM:
    """Answers with as many tokens as it is asked for."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[tuple[int, ...], int]]] = []
        self.answer_len: int | None = None

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        if isinstance(prompts, str):
            return [SimpleNamespace(outputs=[SimpleNamespace(text=" Paris")])]
        self.calls.append(
            [
                (tuple(prompt["prompt_token_ids"]), p.max_tokens)
                for prompt, p in zip(prompts, params, strict=True)
            ]
        )
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=[0] * (self.answer_len or p.max_tokens))],
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    fake_config: list[Any] = []
    monkeypatch.setattr(offline, "make_llm", lambda config: fake_config.append(config) or fake)
    return fake


def _bench(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_subcommands(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


def test_latency_asks_for_first_tokens_and_whole_answers(llm: FakeLLM, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = ["--batch-size", "2", "--input-len", "6", "--output-len", "5", "--num-iters", "2"]
    assert _bench("latency", *shape, "--repeat", "2", "--json", str(out)) == 0
    assert [{n for _, n in call} for call in llm.calls] == [{5}, *[{1}, {5}] * 4]
    prompts = [prompt for call in llm.calls for prompt, _ in call]
    # No batch may be answered from an earlier one's blocks.
    assert len(set(prompts)) == len(prompts) == 18
    report = orjson.loads(out.read_bytes())
    assert len(report["runs"]) == 2
    assert {"ttft_p50_ms", "step_p50_ms", "output_tokens_per_s"} <= set(report["medians"])
    assert report["check"].endswith("' Paris'")


def test_throughput_counts_tokens(llm: FakeLLM, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = ["--num-requests", "6", "--input-len", "10", "--output-len", "4", "--num-warmups", "1"]
    assert _bench("throughput", *shape, "--repeat", "3", "--json", str(out)) == 0
    [warm, *runs] = llm.calls
    assert len(warm) == 1
    assert [len(call) for call in runs] == [6, 6, 6]
    assert len({prompt for call in runs for prompt, _ in call}) == 18
    medians = orjson.loads(out.read_bytes())["medians"]
    assert medians["num_prompt_tokens"]["median"] == 60
    assert medians["num_output_tokens"]["median"] == 24


def test_short_answers_are_no_result(llm: FakeLLM) -> None:
    llm.answer_len = 3
    with pytest.raises(RuntimeError, match=r"\[3\] tokens"):
        _bench("throughput", "--num-requests", "1", "--output-len", "4", "--num-warmups", "0")


def test_settings_name_what_was_changed() -> None:
    parser = argparse.ArgumentParser()
    offline.add_engine_arguments(parser)
    args = parser.parse_args(["--model", "m", "--load-format", "dummy", "--max-num-seqs", "8"])
    config = offline.engine_config(args)
    assert offline.settings(config) == {"model": "m", "load_format": "dummy", "max_num_seqs": 8}


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _bench("latency", "--block-size", "0") == 2
    assert "--block-size" in capsys.readouterr().err


def test_every_benchmark_has_a_program() -> None:
    folder = Path(__file__).resolve().parents[2] / "bench"
    for name in BENCHMARKS:
        assert f'main("{name}")' in (folder / f"{name}.py").read_text()
