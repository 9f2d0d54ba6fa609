"""Decoders that classify or score by their last token, against transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM
from octavo.errors import ModelLoadError
from octavo.models.registry import CLASSIFIERS, ModelRegistry
from tiny_encoders import save_tokenizer

FAMILIES = list(dict.fromkeys(name.partition("For")[0] for name in CLASSIFIERS))
LENGTHS = (5, 1, 40, 17, 100)
# "no" and "yes" of a tokenizer of the words w0, w1, ...
NO, YES = "w7", "w3"
RERANKER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": [NO, YES],
    "is_original_qwen3_reranker": True,
}
PAIRS = [("w5 w6 w7", " w8 w9"), ("w5", ""), ("w11 w12 ", "w20 " * 30)]


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


def joined_ids(first: str, second: str) -> list[int]:
    return [2, *(int(word[1:]) + 4 for word in (first + second).split()), 3]


def last_logits(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """Of each text's last position, from a classifier or a language model."""
    rows = []
    for ids in texts:
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits
        rows.append(logits[0] if logits.dim() == 2 else logits[0, -1])
    return torch.stack(rows)


def save_classifier(path: Path, family: str, num_labels: int) -> Any:
    import transformers
    from fidelity import tiny_config

    torch.manual_seed(0)
    heads = {"head_dim": 40} if family in ("Qwen3", "Gemma", "Gemma2") else {}
    config = tiny_config(family, num_labels=num_labels, pad_token_id=None, **heads)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    model.eval().save_pretrained(path)
    save_tokenizer(path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_is_what_transformers_computes(
    family: str, tmp_path: Path, backend: str
) -> None:
    model = save_classifier(tmp_path, family, 3)
    assert f"{family}ForSequenceClassification" in ModelRegistry.get_supported_archs()
    # Steps of 64 tokens, and one text that is longer.
    llm = LLM(
        str(tmp_path),
        threads=1,
        attention_backend=backend,
        max_num_batched_tokens=64,
        max_model_len=128,
    )
    outputs = llm.classify(prompts(), use_tqdm=False)
    found = torch.tensor([output.outputs.probs for output in outputs])
    expected = last_logits(model, prompts()).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_converted_reranker_scores_joined_texts(tmp_path: Path) -> None:
    """Qwen3ForSequenceClassification of one label, as converted Qwen3-Rerankers are."""
    model = save_classifier(tmp_path, "Qwen3", 1)
    llm = LLM(str(tmp_path), threads=1)
    firsts, seconds = zip(*PAIRS, strict=True)
    outputs = llm.score(firsts, seconds, use_tqdm=False)
    texts = [joined_ids(*pair) for pair in PAIRS]
    assert [output.prompt_token_ids for output in outputs] == texts
    expected = last_logits(model, texts)[:, 0]
    found = torch.tensor([output.outputs.score for output in outputs])
    torch.testing.assert_close(found, expected.sigmoid(), atol=1e-4, rtol=1e-4)
    raw = llm.score(firsts, seconds, use_activation=False, use_tqdm=False)
    found = torch.tensor([output.outputs.score for output in raw])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    [cut] = llm.score("w5 w6", " w7 w8", truncate_prompt_tokens=5, use_tqdm=False)
    assert cut.prompt_token_ids == joined_ids("w5 w6", " w7")


@pytest.mark.parametrize("tied", [True, False])
def test_an_original_reranker_answers_yes_or_no(
    tied: bool, save_tiny: Callable[..., tuple[Path, Any]], backend: str
) -> None:
    path, model = save_tiny("Qwen3", head_dim=40, tie_word_embeddings=tied)
    save_tokenizer(path)
    llm = LLM(str(path), threads=1, attention_backend=backend, hf_overrides=RERANKER)
    firsts, seconds = zip(*PAIRS, strict=True)
    outputs = llm.score(firsts, seconds, use_tqdm=False)
    logits = last_logits(model, [joined_ids(*pair) for pair in PAIRS])
    # The probability of "yes" of the two.
    expected = logits[:, [int(NO[1:]) + 4, int(YES[1:]) + 4]].softmax(-1)[:, 1]
    found = torch.tensor([output.outputs.score for output in outputs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_each_token_may_be_a_label(save_tiny: Callable[..., tuple[Path, Any]]) -> None:
    path, model = save_tiny("Qwen3", head_dim=40)
    save_tokenizer(path)
    overrides = {**RERANKER, "is_original_qwen3_reranker": False}
    outputs = LLM(str(path), threads=1, hf_overrides=overrides).classify(prompts(), use_tqdm=False)
    chosen = last_logits(model, prompts())[:, [int(NO[1:]) + 4, int(YES[1:]) + 4]]
    found = torch.tensor([output.outputs.probs for output in outputs])
    torch.testing.assert_close(found, chosen.softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classifier_from_token": "yes"}, "must be a list"),
        ({"classifier_from_token": [NO, "yes"]}, "'yes', not a token"),
        ({"classifier_from_token": [YES]}, "must name two tokens"),
        ({"method": "mean", "is_original_qwen3_reranker": False}, "'mean' of scores"),
        ({"classifier_from_token": None}, "score.weight is missing"),
    ],
)
def test_a_bad_classifier_is_refused(
    changed: dict[str, Any], message: str, save_tiny: Callable[..., tuple[Path, Any]]
) -> None:
    path, _model = save_tiny("Qwen3", head_dim=40)
    save_tokenizer(path)
    with pytest.raises(ModelLoadError, match=message):
        LLM(str(path), hf_overrides={**RERANKER, **changed})


def test_without_the_overrides_it_generates(save_tiny: Callable[..., tuple[Path, Any]]) -> None:
    path, _model = save_tiny("Qwen3", head_dim=40)
    save_tokenizer(path)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    with pytest.raises(ValueError, match="generates text"):
        LLM(str(path), threads=1).score("a", "b")
