"""Clients that others wrote, against a server of a tiny random model: lm-eval, litellm, LangChain.

The ``openai`` package has a file of its own. Nothing here reaches beyond this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RunningServer

from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json
from octavo.config import EngineConfig
from octavo.engine.engine import AsyncEngine
from octavo.server.http.config import ServerConfig

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """Settings that keep these packages from looking around."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setenv("LANGSMITH_TRACING", "false")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and transformers' model of what is in it."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf_model = transformers.LlamaForCausalLM(config).eval()
    hf_model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(dummy_tokenizer_json(300))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, hf_model


@pytest.fixture(scope="module")
def server(model: tuple[Path, Any]) -> Iterator[RunningServer]:
    engine = AsyncEngine(
        EngineConfig(
            model=str(model[0]),
            served_model_name=("tiny",),
            dtype="float32",
            threads=1,
            max_num_batched_tokens=64,
        )
    )
    server = RunningServer(engine, ServerConfig(port=0, shutdown_timeout=0.2))
    server.may_load.set()
    assert server.ready.wait(60)
    yield server
    server.stop()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval_finds_what_transformers_finds(
    server: RunningServer, model: tuple[Path, Any], tmp_path: Path, batch_size: int
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    folder, hf_model = model
    text = (DATA / "capitals.yaml").read_text()
    files = {"data_files": {"test": str(DATA / "capitals.jsonl")}, "cache_dir": str(tmp_path)}
    (tmp_path / "capitals.yaml").write_text(f"{text}dataset_kwargs: {json.dumps(files)}\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(folder),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 2,
            "max_length": 512,
        },
        tasks=["octavo_capitals"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    samples = results["samples"]["octavo_capitals"]
    assert len(samples) == 10
    num_right = 0
    for sample in samples:
        expected = []
        for arguments, [(logprob, is_greedy)] in zip(
            _pairs(sample["arguments"]), sample["resps"], strict=True
        ):
            context, continuation = arguments
            ids = tokenizer(context + continuation)["input_ids"]
            begin = len(tokenizer(context)["input_ids"])
            with torch.inference_mode():
                rows = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)[begin - 1 : -1]
            own = rows.gather(1, torch.tensor(ids[begin:])[:, None])
            expected.append(float(own.sum()))
            assert float(logprob) == pytest.approx(expected[-1], abs=1e-3)
            assert is_greedy == bool((rows.argmax(-1) == torch.tensor(ids[begin:])).all())
        num_right += expected.index(max(expected)) == sample["doc"]["answer"]
    assert results["results"]["octavo_capitals"]["acc,none"] == pytest.approx(num_right / 10)


def _pairs(arguments: Any) -> list[tuple[str, str]]:
    """(context, continuation) of a logged sample."""
    if isinstance(arguments, dict):
        return [(a["arg_0"], a["arg_1"]) for a in arguments.values()]
    return [(str(a[0]), str(a[1])) for a in arguments]


def test_litellm(server: RunningServer) -> None:
    litellm = pytest.importorskip("litellm")
    target: dict[str, Any] = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = litellm.completion(**target)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    chunks = list(litellm.completion(**target, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    again = asyncio.run(litellm.acompletion(**target, logprobs=True, top_logprobs=2))
    assert again.choices[0].message.content == text
    assert len(again.choices[0].logprobs.content) == 12
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**target, "messages": [{"role": "user", "content": "x" * 600}]})
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(**target, top_p=7)


def test_langchain(server: RunningServer) -> None:
    pytest.importorskip("langchain_openai")
    from langchain_openai import ChatOpenAI, OpenAI

    settings: dict[str, Any] = {
        "model": "tiny",
        "base_url": f"{server.url}/v1",
        "api_key": os.environ["OPENAI_API_KEY"],
        "temperature": 0,
        "max_tokens": 12,
    }
    chat = ChatOpenAI(**settings)
    whole = chat.invoke("Say something.")
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.response_metadata["finish_reason"] == "length"
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Say something."))
    assert streamed == whole.content
    assert [answer.content for answer in chat.batch(["Say something."] * 3)] == [streamed] * 3
    assert asyncio.run(chat.ainvoke("Say something.")).content == streamed
    plain = OpenAI(**settings)
    text = plain.invoke("Once")
    assert text
    assert "".join(plain.stream("Once")) == text
