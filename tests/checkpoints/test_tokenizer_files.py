"""TokenizerFiles: the same ids as transformers gives, whatever file a token is in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoints.tokenizer_files import TokenizerFiles
from octavo.errors import ModelLoadError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the<tool>sea <x> is <end>  deep the <tool> sea"


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True, **plain, **flags}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a byte-level tokenizer and the given files beside it."""

    def write(config: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {text: index for index, text in enumerate(["<begin>", "<end>", *alphabet])}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        ends = ("<begin>", "<end>")
        inner.add_tokens([AddedToken(text, special=True, normalized=False) for text in ends])
        inner.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
        for name, value in {"tokenizer_config": config, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        # transformers asks it for the model's type.
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return tmp_path

    return write


SIZE = 2 + 256
NEW = str(SIZE)
NEXT = str(SIZE + 1)


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, {}),
        ({"added_tokens_decoder": {NEW: token("<tool>"), NEXT: token("<x>")}}, {}),
        # Ids go by the order of the stated ones.
        ({"added_tokens_decoder": {NEXT: token("<x>"), NEW: token("<tool>")}}, {}),
        ({"added_tokens_decoder": {NEW: token("<tool>", rstrip=True, lstrip=True)}}, {}),
        ({"added_tokens_decoder": {NEW: token("sea", single_word=True, special=False)}}, {}),
        # A token that is there gets other flags; one of the vocabulary becomes an added one.
        ({"added_tokens_decoder": {"1": token("<end>", rstrip=True)}}, {}),
        ({"additional_special_tokens": ["a", "<tool>"]}, {}),
        ({"additional_special_tokens": ["<tool>", "<x>"]}, {}),
        (
            {"additional_special_tokens": [{"__type": "AddedToken", **token("<x>", lstrip=True)}]},
            {},
        ),
        ({"extra_special_tokens": ["<x>", "<tool>"]}, {}),
        ({"extra_special_tokens": {"image_token": "<x>", "audio_token": "<tool>"}}, {}),
        ({"image_token": "<tool>"}, {}),
        ({"eos_token": "<tool>", "pad_token": "<x>", "bos_token": "<begin>"}, {}),
        (
            {
                "added_tokens_decoder": {NEW: token("<tool>", special=False)},
                "additional_special_tokens": ["<x>", "<tool>"],
                "eos_token": "<tool>",
            },
            {},
        ),
        ({}, {"added_tokens": {"<tool>": SIZE, "<x>": SIZE + 1}}),
        ({}, {"added_tokens": {"<x>": SIZE + 1, "<tool>": SIZE, "<end>": 1}}),
        ({"eos_token": "<x>"}, {"added_tokens": {"<tool>": SIZE, "<x>": SIZE + 1}}),
        (
            {"added_tokens_decoder": {NEW: token("<tool>")}},
            {"added_tokens": {"<x>": SIZE}, "special_tokens_map": {"eos_token": "<x>"}},
        ),
        (
            {},
            {"special_tokens_map": {"eos_token": "<x>", "additional_special_tokens": ["<tool>"]}},
        ),
        (
            {"additional_special_tokens": ["<tool>"]},
            {"special_tokens_map": {"additional_special_tokens": ["<x>"]}},
        ),
        ({}, {"special_tokens_map": {"eos_token": token("<x>", lstrip=True)}}),
        ({"additional_special_tokens": None, "eos_token": None, "extra_special_tokens": []}, {}),
        ({"add_prefix_space": True}, {}),
        ({"add_prefix_space": True, "tokenizer_class": "GPT2TokenizerFast"}, {}),
        ({"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}, {}),
        ({"add_prefix_space": True, "tokenizer_class": "GPTNeoXTokenizerFast"}, {}),
        ({"add_prefix_space": True, "tokenizer_class": "LlamaTokenizerFast"}, {}),
    ],
)
def test_ids_are_those_of_transformers(
    folder: Callable[..., Path], config: dict[str, Any], files: dict[str, Any]
) -> None:
    path = folder(config, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = TokenizerFiles(path / "tokenizer.json").load()
    for text in (TEXT, "sea", " sea"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, False) == ids
        if text == TEXT:
            assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("config", "files", "warning"),
    [
        ({"added_tokens_decoder": {"900": token("<tool>")}}, {}, f"'<tool>' has id {NEW}, not 900"),
        ({"added_tokens_decoder": {"7": token("<tool>")}}, {}, f"'<tool>' has id {NEW}, not 7"),
        ({"added_tokens_decoder": {NEW: token("")}}, {}, f"token '{NEW}' cannot be added"),
        ({"added_tokens_decoder": {NEW: "<tool>"}}, {}, f"'{NEW}' cannot be added: '<tool>'"),
        ({"added_tokens_decoder": {"x": token("<tool>")}}, {}, "'x' cannot be added: {'content'"),
        ({"additional_special_tokens": ["<x>", 7]}, {}, "additional_special_tokens: 7 cannot"),
        ({"eos_token": ""}, {}, "eos_token: '' cannot be added"),
        ({}, {"added_tokens": {"<tool>": "7"}}, "'<tool>' cannot be added as '7'"),
        ({}, {"added_tokens": {"<tool>": 900}}, f"'<tool>' has id {NEW}, not 900"),
    ],
)
def test_a_token_that_cannot_be_added_is_named(
    folder: Callable[..., Path],
    config: dict[str, Any],
    files: dict[str, Any],
    warning: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = folder(config, **files)
    with caplog.at_level(logging.WARNING, "octavo.checkpoints"):
        TokenizerFiles(path / "tokenizer.json").load()
    (record,) = caplog.records
    assert warning in record.getMessage()
    assert str(path) in record.getMessage()


def test_names_of_tokens_are_read_from_both_files(folder: Callable[..., Path]) -> None:
    config = {"eos_token": {"content": "<end>"}, "bos_token": None, "image_token": "<x>"}
    files = TokenizerFiles(
        folder(
            {**config, "added_tokens_decoder": {}},
            special_tokens_map={"eos_token": "<tool>", "bos_token": "<begin>", "pad_token": "<p>"},
        )
        / "tokenizer.json"
    )
    assert files.named_tokens == {
        "eos_token": "<end>",
        "bos_token": None,
        "image_token": "<x>",
        "pad_token": "<p>",
    }
    assert files.end_texts == ["<end>", "<tool>"]


def test_a_file_that_is_no_json_is_named(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"special_tokens_map\.json: not a JSON object"):
        TokenizerFiles(path / "tokenizer.json").load()
