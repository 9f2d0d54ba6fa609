"""One model behind two runners: the plain one, and that of GPUs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.engine import engine_loop
from octavo.kernels.gpu import ops as gpu
from octavo.llm import LLM
from octavo.runner import loading
from octavo.runner.eager import EagerRunner
from octavo.runner.graphs import GraphRunner

# The first and the prompts of a second round begin alike.
SHARED = list(range(3, 24))
PROMPTS = [[*SHARED, 5, 6, 7], [9], list(range(50, 57))]


def each_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has engines made of the plain runner, then of that of GPUs, interpreted."""
    for runner in (EagerRunner, GraphRunner):
        monkeypatch.setattr(
            engine_loop,
            "make_runner",
            lambda config, source, runner=runner: runner(loading.load(config, source)),
        )
        if runner is GraphRunner:
            monkeypatch.setattr(loading, "get_ops", lambda *_: gpu.OPS)
        yield


def both_runners(folder: Path, monkeypatch: pytest.MonkeyPatch, **mesh: Any) -> Iterator[LLM]:
    """The model in ``folder`` behind the plain runner, then behind that of GPUs, interpreted."""
    for _ in each_runner(monkeypatch):
        yield LLM(
            str(folder),
            load_format="dummy",
            device="cpu",
            dtype="float32",
            attention_backend="reference",
            threads=1,
            enforce_eager=True,
            block_size=4,
            state_checkpoint_interval=8,
            max_num_batched_tokens=24,
            max_num_seqs=4,
            max_model_len=64,
            **mesh,
        )
