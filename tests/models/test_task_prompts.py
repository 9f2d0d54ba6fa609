"""Prompts of a sentence-transformers folder: a text embeds as prompt and text in one do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncEngineArgs, AsyncLLM, PoolingParams
from octavo.errors import InvalidParameterError, ModelLoadError, UnsupportedParameterError
from tiny_encoders import save_encoder, write_modules

PROMPTS = {"query": "w7 w8 ", "document": "", "clustering": "w9 "}
TEXT = "w5 w6"


def save(path: Path, default: str | None = None, **pooling: Any) -> Any:
    model = save_encoder(path)
    write_modules(path, {"pooling_mode_mean_tokens": True, **pooling})
    settings = {"prompts": PROMPTS, "default_prompt_name": default, "similarity_fn_name": "cosine"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return model


def expected(model: Any, text: str) -> list[float]:
    ids = [2, *(int(word[1:]) + 4 for word in text.split()), 3]
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0].mean(0).tolist()


def vector(llm: LLM, text: Any = TEXT, **given: Any) -> list[float]:
    [output] = llm.embed(text, use_tqdm=False, **given)
    return output.outputs.embedding


@pytest.mark.parametrize("default", [None, "query"])
def test_a_text_comes_after_its_prompt(default: str | None, tmp_path: Path) -> None:
    model = save(tmp_path, default)
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    plain = PROMPTS.get(default or "", "") + TEXT
    for given, text in (
        ({}, plain),
        ({"prompt_name": "query"}, "w7 w8 " + TEXT),
        ({"prompt_name": "document"}, TEXT),
        ({"prompt": "w11 "}, "w11 " + TEXT),
        ({"prompt": "w11 ", "prompt_name": "query"}, "w11 " + TEXT),
        ({"prompt_name": "clustering", "truncate_prompt_tokens": 4}, "w9 w5"),
    ):
        assert vector(llm, **given) == pytest.approx(expected(model, text), abs=1e-4), given
    [encoded] = llm.encode(TEXT, prompt_name="query", use_tqdm=False)
    assert encoded.outputs.data.tolist() == pytest.approx(vector(llm, prompt_name="query"))
    # Token ids are taken as they are.
    ids = [2, 9, 10, 3]
    assert vector(llm, [ids]) == pytest.approx(expected(model, TEXT), abs=1e-4)
    [score] = llm.score(TEXT, plain if default is None else TEXT, use_tqdm=False)
    assert score.outputs.score == pytest.approx(1, abs=1e-5)
    assert len(score.prompt_token_ids) == 2 * (2 + len(plain.split()))


def test_the_async_engine_takes_the_default(tmp_path: Path) -> None:
    model = save(tmp_path, "query")

    async def run() -> list[float]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(tmp_path), threads=1, dtype="float32")
        )
        try:
            async for output in engine.encode(TEXT, PoolingParams()):
                return output.outputs.data.tolist()
        finally:
            engine.shutdown()
        raise AssertionError("no output")

    assert asyncio.run(run()) == pytest.approx(expected(model, "w7 w8 " + TEXT), abs=1e-4)


def test_what_a_model_has_no_prompt_for_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    llm = LLM(str(tmp_path), threads=1)
    with pytest.raises(InvalidParameterError, match="'clustering', 'document', 'query'") as error:
        vector(llm, prompt_name="passage")
    assert error.value.param == "prompt_name"
    with pytest.raises(InvalidParameterError, match="needs prompts of text"):
        vector(llm, [[2, 9, 3]], prompt_name="query")


def test_prompts_that_are_not_to_be_pooled(tmp_path: Path) -> None:
    model = save(tmp_path, include_prompt=False)
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    assert vector(llm) == pytest.approx(expected(model, TEXT), abs=1e-4)
    assert vector(llm, prompt_name="document") == pytest.approx(expected(model, TEXT), abs=1e-4)
    for given in ({"prompt_name": "query"}, {"prompt": "w5 "}):
        with pytest.raises(UnsupportedParameterError, match="leaves prompts out"):
            vector(llm, **given)
    save(tmp_path, "query", include_prompt=False)
    with pytest.raises(ModelLoadError, match="include_prompt is false"):
        LLM(str(tmp_path))


@pytest.mark.parametrize(
    "values", [{"prompts": ["x"]}, {"prompts": {"a": 1}}, {"default_prompt_name": "a"}]
)
def test_a_bad_file_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(values))
    with pytest.raises(ModelLoadError, match="prompts must be texts by name"):
        LLM(str(tmp_path))
