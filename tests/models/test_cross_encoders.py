"""Cross-encoders, and scores of pairs, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from octavo import LLM
from octavo.errors import InvalidParameterError, ModelLoadError
from tiny_encoders import minilm_folder, save_encoder

CROSS_ENCODERS = (
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
)
PAIRS = [
    ("w5 w6 w7", "w8 w9"),
    ("w5", "w5 " * 30),
    ("w11 w12 w13 w14 w15 w16 w17 w18", ""),
    ("w20 w21", "w22 w23 w24 w25"),
]


def pair_ids(first: str, second: str) -> tuple[list[int], list[int]]:
    """Token ids and types, in BERT's frame."""
    a, b = ([int(word[1:]) + 4 for word in text.split()] for text in (first, second))
    return [2, *a, 3, *b, 3], [0] * (len(a) + 2) + [1] * (len(b) + 1)


def logit_of(model: torch.nn.Module, first: str, second: str) -> float:
    ids, types = pair_ids(first, second)
    if model.config.type_vocab_size == 1:
        types = [0] * len(types)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    return float(out.logits[0, 0])


@pytest.mark.parametrize("architecture", CROSS_ENCODERS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_family_is_what_transformers_computes(
    architecture: str, backend: str, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path, architecture)
    llm = LLM(
        str(tmp_path),
        threads=1,
        dtype="float32",
        attention_backend=backend,
        max_num_batched_tokens=64,
    )
    firsts, seconds = zip(*PAIRS, strict=True)
    outputs = llm.score(firsts, seconds, use_activation=False, use_tqdm=False)
    expected = [logit_of(model, *pair) for pair in PAIRS]
    assert [o.outputs.score for o in outputs] == pytest.approx(expected, abs=1e-4)
    assert [o.prompt_token_ids for o in outputs] == [pair_ids(*pair)[0] for pair in PAIRS]
    squashed = llm.score(firsts, seconds, use_tqdm=False)
    sigmoids = [1 / (1 + math.exp(-x)) for x in expected]
    assert [o.outputs.score for o in squashed] == pytest.approx(sigmoids, abs=1e-4)
    [label] = llm.classify(["w5 w6 w7"], use_tqdm=False)
    with torch.inference_mode():
        alone = model(input_ids=torch.tensor([[2, 9, 10, 11, 3]])).logits.sigmoid()
    assert label.outputs.probs == pytest.approx(alone[0].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="does not embed: use score"):
        llm.embed(["w5"])
    with pytest.raises(ValueError, match="generates no text: use score"):
        llm.generate(["w5"])


def test_the_function_behind_a_score_is_the_models(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "BertForSequenceClassification")
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for key, value in (
        ("sbert_ce_default_activation_function", "torch.nn.modules.linear.Identity"),
        ("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"}),
    ):
        file.write_text(json.dumps({**raw, key: value}))
        [output] = LLM(str(tmp_path), threads=1, dtype="float32").score(*PAIRS[0], use_tqdm=False)
        assert output.outputs.score == pytest.approx(logit_of(model, *PAIRS[0]), abs=1e-4)
    file.write_text(json.dumps({**raw, "sentence_transformers": {"activation_fn": "a.Softmax"}}))
    with pytest.raises(ModelLoadError, match="activation 'Softmax' of scores is not supported"):
        LLM(str(tmp_path))


def test_the_longer_text_of_a_pair_is_cut(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForSequenceClassification")
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    a, b = [f"w{n}" for n in range(9)], [f"w{n}" for n in range(50, 55)]

    def cut(first: list[str], second: list[str], most: int) -> list[int]:
        [output] = llm.score(
            " ".join(first), " ".join(second), truncate_prompt_tokens=most, use_tqdm=False
        )
        return output.prompt_token_ids

    # Three of each number are special; the second text has an odd token.
    for first, second, most, keeps in (
        (a, b, 17, (9, 5)),
        (a, b, 14, (6, 5)),
        (a, b, 13, (5, 5)),
        (a, b, 12, (4, 5)),
        (a, b, 8, (2, 3)),
        (b, a, 14, (5, 6)),
        (b, a, 12, (4, 5)),
        (a, b, 4, (0, 1)),
    ):
        expected, _ = pair_ids(" ".join(first[: keeps[0]]), " ".join(second[: keeps[1]]))
        assert cut(first, second, most) == expected, most
    with pytest.raises(InvalidParameterError, match="room for 3 special tokens"):
        cut(a, b, 2)


def test_bi_encoders_score_by_cosine() -> None:
    llm = LLM(str(minilm_folder()), threads=1)
    query, documents = "What is a cat?", ["A cat is an animal.", "It rains.", "What is a cat?"]
    outputs = llm.score(query, documents, use_tqdm=False)
    vectors = torch.tensor(
        [o.outputs.embedding for o in llm.embed([query, *documents], use_tqdm=False)]
    )
    expected = torch.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    assert [o.outputs.score for o in outputs] == pytest.approx(expected, abs=1e-5)
    assert outputs[2].outputs.score == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="2 texts for 3"):
        llm.score(["a", "b"], documents)
