"""Classifiers of several labels, and LLM.encode, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import LLM
from tiny_encoders import save_encoder

CLASSIFIERS = (
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
)
TEXTS = ["w5 w6 w7", "w8 " * 40, "", "w20 w21"]


def frame(text: str) -> list[int]:
    """Token ids, in BERT's frame."""
    return [2, *(int(word[1:]) + 4 for word in text.split()), 3]


def logits_of(model: torch.nn.Module, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([frame(text)])).logits[0]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_classifier_is_what_transformers_computes(
    architecture: str, backend: str, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path, architecture, num_labels=5)
    llm = LLM(
        str(tmp_path),
        threads=1,
        dtype="float32",
        attention_backend=backend,
        max_num_batched_tokens=64,
    )
    outputs = llm.classify(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        expected = logits_of(model, text).softmax(0).tolist()
        assert output.outputs.probs == pytest.approx(expected, abs=1e-4)
        assert output.outputs.num_classes == 5
        assert output.prompt_token_ids == frame(text)
    # Token ids are texts too; what is encoded is what is classified.
    [encoded] = llm.encode(frame(TEXTS[0]), use_tqdm=False)
    # Alone here, among others there: products of few rows are summed in another order.
    assert encoded.outputs.data.tolist() == pytest.approx(outputs[0].outputs.probs, abs=1e-5)
    with pytest.raises(ValueError, match="does not embed: use classify"):
        llm.score("w5", "w6")
    with pytest.raises(ValueError, match="generates no text: use classify"):
        llm.generate(["w5"])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_activation_is_that_of_the_training(problem: str, tmp_path: Path) -> None:
    model = save_encoder(
        tmp_path, "BertForSequenceClassification", num_labels=3, problem_type=problem
    )
    [output] = LLM(str(tmp_path), threads=1, dtype="float32").classify(TEXTS[0], use_tqdm=False)
    logits = logits_of(model, TEXTS[0])
    expected = logits if problem == "regression" else logits.sigmoid()
    assert output.outputs.probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_encode_gives_an_embedding_models_vectors(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    vectors = llm.embed(TEXTS, use_tqdm=False)
    for task in (None, "embed"):
        found = llm.encode(TEXTS, pooling_task=task, use_tqdm=False)
        for one, vector in zip(found, vectors, strict=True):
            assert one.finished
            torch.testing.assert_close(one.outputs.data, torch.tensor(vector.outputs.embedding))
    assert llm.encode([], use_tqdm=False) == []
    with pytest.raises(ValueError, match="does not classify: use embed"):
        llm.encode("w5", pooling_task="classify")
    with pytest.raises(ValueError, match="does not classify: use embed"):
        llm.classify("w5")
    with pytest.raises(ValueError, match="this model does not token_embed: use embed"):
        llm.encode("w5", pooling_task="token_embed")
