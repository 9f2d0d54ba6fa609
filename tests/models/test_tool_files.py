"""Files that the formats' own tools wrote: the model's logits are those of the tool's own reading.

``make_tool_files.py`` made them, and the logits beside them, with the tools named there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.sampling_params import SamplingParams

FOLDER = Path(__file__).resolve().parents[1] / "data" / "quantized"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_tools(name: str, driver: Callable[..., Any]) -> None:
    expected = load_file(FOLDER / f"{name}-logits.safetensors")
    ids, want = expected["ids"].tolist(), expected["logits"]
    greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for backend in ("reference", "native"):
        engine = driver(FOLDER / name, attention_backend=backend)
        torch.testing.assert_close(engine.logits(ids), want, atol=1e-3, rtol=0)
    prompts = [ids[:end] for end in range(1, len(ids) + 1)]
    tokens = [output.token_ids[-1] for output in engine.generate(prompts, greedy)]
    assert tokens == want.argmax(-1).tolist()
    assert len(set(tokens)) > 5
    # As a CPU serves them: activations rounded to 12 bits or more.
    served = driver(FOLDER / name, dtype="auto").logits(ids)
    assert (served - want).norm() < 0.01 * want.norm()
