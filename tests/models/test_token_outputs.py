"""Outputs of single tokens: classifiers of tokens, and models of whole texts that PoolerConfig makes
answer for each token, against transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, PoolingParams
from octavo.config import PoolerConfig
from octavo.errors import ModelLoadError
from tiny_encoders import save_encoder, save_tokenizer

LABELS = {0: "none", 1: "name", 2: "place"}
PER_TOKEN = PoolerConfig(task="token_classify")


def prompts() -> list[list[int]]:
    return [[2, *random.Random(n).choices(range(4, 300), k=n), 3] for n in (5, 1, 40, 17)]


def load(path: Path, **config: Any) -> LLM:
    # Steps of 64 tokens: several texts in one, and several steps.
    return LLM(str(path), threads=1, dtype="float32", max_num_batched_tokens=64, **config)


def check(llm: LLM, model: Any, compute: Any, task: str) -> None:
    outputs = llm.encode(prompts(), pooling_task=task, use_tqdm=False)
    for output, ids in zip(outputs, prompts(), strict=True):
        with torch.inference_mode():
            expected = compute(model, torch.tensor([ids]))[0]
        torch.testing.assert_close(output.outputs.data, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["Bert", "Roberta", "XLMRoberta", "DistilBert", "Electra", "ModernBert"]
)
def test_an_encoder_s_tokens_are_classified(family: str, tmp_path: Path) -> None:
    ids = {"pad_token_id": 0} if family == "ModernBert" else {}
    name = f"{family}ForTokenClassification"
    model = save_encoder(tmp_path, name, num_labels=3, id2label=LABELS, **ids)
    llm = load(tmp_path)
    check(llm, model, lambda model, ids: model(ids).logits.softmax(-1), "token_classify")
    [raw] = llm.encode(prompts()[0], PoolingParams(use_activation=False), use_tqdm=False)
    with torch.inference_mode():
        logits = model(torch.tensor(prompts()[:1])).logits[0]
    torch.testing.assert_close(raw.outputs.data, logits, atol=1e-4, rtol=1e-4)
    # As programs for vLLM look the names up.
    assert llm.llm_engine.vllm_config.model_config.hf_config.id2label == LABELS
    for call in (llm.classify, llm.embed):
        with pytest.raises(ValueError, match="use token_classify"):
            call(prompts(), use_tqdm=False)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_decoder_s_tokens_are_classified(family: str, tmp_path: Path) -> None:
    import transformers
    from fidelity import tiny_config

    torch.manual_seed(0)
    config = tiny_config(family, num_labels=2, pad_token_id=None)
    model = getattr(transformers, f"{family}ForTokenClassification")(config).eval()
    with torch.no_grad():
        model.score.bias.add_(torch.randn(2))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    check(load(tmp_path), model, lambda model, ids: model(ids).logits.softmax(-1), "token_classify")


def test_a_classifier_of_texts_may_classify_each_token(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "BertForSequenceClassification", num_labels=3)

    def compute(model: Any, ids: torch.Tensor) -> torch.Tensor:
        hidden = model.bert(ids).last_hidden_state
        return model.classifier(model.bert.pooler.dense(hidden).tanh()).softmax(-1)

    check(load(tmp_path, pooler_config=PER_TOKEN), model, compute, "token_classify")


@pytest.mark.parametrize("pooler", [{"task": "token_embed"}, {"pooling_type": "ALL"}])
def test_an_embedder_may_embed_each_token(pooler: dict[str, str], tmp_path: Path) -> None:
    model = save_encoder(tmp_path)
    llm = load(tmp_path, pooler_config=pooler)
    check(llm, model, lambda model, ids: model(ids).last_hidden_state, "token_embed")
    # Of vectors of tokens a score is the sum of each one's best product.
    [score] = llm.score("w5 w6", "w7 w8 w9", use_tqdm=False)
    one, two = (each.outputs.data for each in llm.encode(["w5 w6", "w7 w8 w9"], use_tqdm=False))
    assert score.outputs.score == pytest.approx(float((one @ two.T).amax(1).sum()), rel=1e-4)


@pytest.mark.parametrize(("kind", "take"), [("CLS", 0), ("LAST", -1), ("MEAN", None)])
def test_an_embedder_s_pooling_may_be_chosen(kind: str, take: int | None, tmp_path: Path) -> None:
    model = save_encoder(tmp_path)
    llm = load(tmp_path, pooler_config=PoolerConfig(pooling_type=kind))

    def compute(model: Any, ids: torch.Tensor) -> torch.Tensor:
        hidden = model(ids).last_hidden_state
        return hidden.mean(1) if take is None else hidden[:, take]

    check(llm, model, compute, "embed")


def test_settings_that_are_not_the_model_s_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForSequenceClassification", num_labels=3)
    for pooler, words in (
        ({"task": "embed"}, "pooler_config.task is embed, but this model's is classify"),
        ({"pooling_type": "CLS"}, "pooling CLS is for models that embed"),
    ):
        with pytest.raises(ModelLoadError, match=words):
            load(tmp_path, pooler_config=pooler)
    for pooler, words in (
        ({"task": "sing"}, "pooler_config.task must be one of"),
        ({"pooling_type": "STEP"}, "pooler_config.pooling_type must be one of"),
        ({"dimensions": 8}, "pooler_config.dimensions is not one of"),
    ):
        with pytest.raises(ValueError, match=words):
            load(tmp_path, pooler_config=pooler)
    # Nothing is asked for.
    llm = load(tmp_path, pooler_config={"enable_chunked_processing": False, "dimensions": None})
    assert len(llm.classify(prompts(), use_tqdm=False)) == 4
