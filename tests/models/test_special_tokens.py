"""What ends an answer and what templates call BOS: one truth out of several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo.config import EngineConfig
from octavo.models.source import ModelSource, resolve_model

TOKENS = ["<begin>", "<end>", "<turn>", "<stop>", "a", "b"]


def open_source(path: Path, **config: Any) -> ModelSource:
    return resolve_model(EngineConfig(model=str(path), **config))


@pytest.fixture
def folder(save_tiny: Callable[..., Any]) -> Callable[..., Path]:
    """A tiny model's folder, its small files as given by name without ``.json``."""

    def write(eos_token_id: Any = None, bos_token_id: Any = None, **files: Any) -> Path:
        from tokenizers import AddedToken, Tokenizer, models

        path: Path = save_tiny("Llama")[0]
        config = json.loads((path / "config.json").read_text())
        config |= {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id, "pad_token_id": None}
        (path / "config.json").write_text(json.dumps(config))
        (path / "generation_config.json").unlink(missing_ok=True)
        inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="a"))
        inner.add_tokens([AddedToken(text, special=True) for text in TOKENS[:3]])
        inner.save(str(path / "tokenizer.json"))
        for name, value in files.items():
            (path / f"{name}.json").write_text(json.dumps(value))
        return path

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"eos_token_id": 1}, {1}),
        ({"eos_token_id": [1, 3], "generation_config": {"eos_token_id": 2}}, {1, 2, 3}),
        ({"tokenizer_config": {"eos_token": "<turn>"}}, {2}),
        ({"eos_token_id": 1, "tokenizer_config": {"eos_token": {"content": "<turn>"}}}, {1, 2}),
        ({"special_tokens_map": {"eos_token": "<stop>"}}, {3}),
        ({"special_tokens_map": {"eos_token": {"content": "<turn>", "lstrip": False}}}, {2}),
        (
            {
                "tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": {}},
                "special_tokens_map": {"eos_token": "<turn>"},
            },
            {1, 2},
        ),
        ({"tokenizer_config": {"eos_token": "<end>", "eot_token": "<turn>"}}, {1, 2}),
        # Added by the files beside tokenizer.json.
        (
            {
                "tokenizer_config": {
                    "eos_token": "<new>",
                    "added_tokens_decoder": {"6": {"content": "<new>", "special": True}},
                }
            },
            {6},
        ),
        ({"tokenizer_config": {"eos_token": "<new>"}, "added_tokens": {"<new>": 6}}, {6}),
        ({"tokenizer_config": {"eos_token": None}}, set()),
    ],
)
def test_what_ends_an_answer_is_the_union_of_all_files(
    folder: Callable[..., Path], files: dict[str, Any], expected: set[int]
) -> None:
    assert set(open_source(folder(**files)).eos_token_ids) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"tokenizer_config": {"bos_token": "<begin>"}}, {"bos_token": "<begin>"}),
        ({"special_tokens_map": {"bos_token": "<begin>"}}, {"bos_token": "<begin>"}),
        ({"bos_token_id": 0, "eos_token_id": [2, 1]}, {"bos_token": "<begin>", "eos_token": "<turn>"}),
        ({"generation_config": {"bos_token_id": 3}, "bos_token_id": 0}, {"bos_token": "<stop>"}),
        # null is a word: this model has none.
        ({"bos_token_id": 0, "tokenizer_config": {"bos_token": None}}, {}),
        ({"tokenizer_config": {"image_token": "<stop>"}}, {"image_token": "<stop>"}),
    ],
)  # fmt: skip
def test_names_for_templates(
    folder: Callable[..., Path], files: dict[str, Any], expected: dict[str, str]
) -> None:
    assert open_source(folder(**files)).special_tokens == expected


def test_the_tokenizer_s_own_files_come_with_it(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    path = folder(tokenizer_config={"chat_template": "model's", "eos_token": "<end>"})
    (other / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    settings = {"eos_token": "<turn>", "additional_special_tokens": ["<new>"]}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_source(path, tokenizer=str(other))
    assert source.eos_token_ids == (2,)
    assert source.special_tokens == {"eos_token": "<turn>"}
    assert source.tokenizer.token_to_id("<new>") == len(TOKENS)
    assert source.chat_template == "model's"
    (other / "chat_template.jinja").write_text("tokenizer's")
    assert open_source(path, tokenizer=str(other)).chat_template == "tokenizer's"


# ----------------------------------------------------------------------------------- GGUF


def write_gguf(
    path: Path, tokens: list[str], types: list[int] | None = None, model: str = "gpt2", **ids: int
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if model == "llama":
        writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_merges(["a b"])
    for name, token_id in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    for key, value in {"embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
                       "attention.head_count": 1}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("special", "ids", "expected"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos": 0}, {0, 2}),
        (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], {"eos": 1}, {1, 3}),
        (["<s>", "</s>", "<x>"], {"eos": 2}, {1, 2}),
        (["<|x|>", "<|y|>", "<|z|>"], {"eos": 0, "eot": 1, "eom": 2}, {0, 1, 2}),
        (["<|x|>", "<|eom_id|>", "<|eot_id|>"], {"eos": 0}, {0, 1, 2}),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|x|>"], {"eos": 3}, {0, 1, 2, 3}),
        (["<|x|>", "<|y|>"], {"eos": 1, "fim_pad": 0}, {0, 1}),
        # An answer of several parts: the end of one is not its end.
        (["<|return|>", "<|call|>", "<|end|>"], {"eos": 0}, {0, 1}),
        (["<|flush|>", "<|calls|>", "<|end|>"], {"eos": 0}, {0, 1}),
        (["<|tool_response>", "</s>", "<turn|>"], {"eos": 2}, {0, 2}),
        # Out of the vocabulary.
        (["<|x|>"], {"eos": 0, "eot": 77}, {0}),
    ],
)
def test_a_gguf_file_s_ends_are_known_by_key_and_by_spelling(
    tmp_path: Path, special: list[str], ids: dict[str, int], expected: set[int]
) -> None:
    tokens = [*special, "a", "b", "ab"]
    types = [3] * len(special) + [1] * 3
    source = open_source(write_gguf(tmp_path / "m.gguf", tokens, types, **ids))
    assert {i for i in source.eos_token_ids if i < len(tokens)} == expected


def test_words_of_a_text_end_nothing(tmp_path: Path) -> None:
    """Spellings that a text may hold count as control tokens only; others whatever their type."""
    tokens = ["</s>", "[EOS]", "<|im_end|>", "<x>", "a", "b", "ab"]
    source = open_source(write_gguf(tmp_path / "m.gguf", tokens, [1, 4, 1, 3, 1, 1, 1], eos=3))
    assert set(source.eos_token_ids) == {2, 3}
    assert source.tokenizer.encode("a<|im_end|>b") == [4, 2, 5]
    assert source.tokenizer.decode([4, 2, 5], True) == "ab"
    untyped = open_source(write_gguf(tmp_path / "n.gguf", tokens, eos=3))
    assert set(untyped.eos_token_ids) == {2, 3}


def test_names_for_templates_of_a_gguf_file(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<x>", "a", "b", "ab"]
    types = [2, 3, 3, 3, 1, 1, 1]
    named = write_gguf(tmp_path / "m.gguf", tokens, types, bos=3, eos=2)
    assert open_source(named).special_tokens == {"bos_token": "<x>", "eos_token": "</s>"}
    # SentencePiece's ids need no key.
    bare = write_gguf(tmp_path / "n.gguf", tokens, types, "llama")
    assert open_source(bare).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert open_source(bare).eos_token_ids == (2,)
