"""StepTrace: what a step's phases took, and an engine that is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo._core import EngineCore
from octavo.llm import LLM
from octavo.runner.eager import EagerRunner
from octavo.sampling_params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
PHASES = {"schedule", "launch", "collect", "update", "step"}


def traced(folder: Path, device: Any) -> tuple[LLM, dict[str, float], list[dict[str, Any]]]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(str(folder), load_format="dummy", device=device, kv_cache_memory_bytes=8 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5, 6, 7]}] * 3
    expected = llm.generate(prompts, params, use_tqdm=False)
    file = folder / "trace.json"
    with llm.trace(file) as trace:
        found = llm.generate(prompts, params, use_tqdm=False)
    again = llm.generate(prompts, params, use_tqdm=False)
    for outputs in (found, again):
        assert [o.outputs[0].token_ids for o in outputs] == [
            o.outputs[0].token_ids for o in expected
        ]
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    return llm, trace.summary_us(), events


def test_a_trace_has_every_phase_and_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    llm, summary, events = traced(tmp_path, "cpu")
    assert set(summary) == PHASES | {"host"}
    assert 0 < summary["host"] <= summary["step"]
    steps = [e for e in events if e["name"] == "step"]
    assert len(steps) >= 20
    for event in events:
        assert any(
            step["ts"] <= event["ts"] and event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 1
            for step in steps
        )
    loop = llm._engine
    assert "step" not in vars(loop)
    assert isinstance(loop.runner, EagerRunner)
    assert isinstance(loop.core, EngineCore)
    counts = {name: phase["count"] for name, phase in loop.step_times.snapshot().items()}
    assert counts["launch"] == counts["update"] >= 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_trace_tells_the_devices_time(tmp_path: Path) -> None:
    _, summary, events = traced(tmp_path, "cuda")
    assert set(summary) == PHASES | {
        "host", "wait", "device_step", "device_gap", "device_gap_max"
    }  # fmt: skip
    assert summary["host"] < summary["step"]
    device = [e for e in events if e["pid"] == 2]
    assert len(device) >= 20
    assert all(e["dur"] > 0 for e in device)
    assert 0 < summary["device_gap"] <= summary["device_gap_max"]
