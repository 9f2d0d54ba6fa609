"""GGUF files of encoders, written as llama.cpp writes them, against transformers: from the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from octavo import LLM, _core
from octavo.errors import ModelLoadError
from tiny_encoders import save_encoder

TEXTS = ["a quick Fox, café!", "unknown ☃ words; 你好", "  two   spaces ", "", "fox" * 60]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD_TOKENS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "fox", "quick", "two", ",", "!"),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *("##ick", "##own", "words", ";"),
]
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PIECES += [
    ("▁", -2.0),
    ("▁fox", -3.0),
    ("▁quick", -3.5),
    ("fox", -4.0),
    ("wo", -4.5),
    ("▁two", -3.1),
]
PIECES += [(letter, -6.0 - i / 10) for i, letter in enumerate(LETTERS + ",!;")]
POOLING = {"mean": 1, "cls": 2, "last": 3, "rank": 4}


def word_piece(lowercase: bool = True, cased: bool = False) -> Any:
    """BERT's tokenizer as its tokenizer.json has it."""
    texts = [*WORD_TOKENS, *(["Fox", "##F"] if cased else [])]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(WORD_TOKENS[:5])
    return made


def unigram() -> Any:
    """XLM-RoBERTa's tokenizer, without its table of characters."""
    made = tokenizers.Tokenizer(models.Unigram(PIECES, 3, False))
    made.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.add_special_tokens([text for text, _ in PIECES[:4]])
    return made


def write_word_piece(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """With a space's mark before words, and none on what continues them."""
    vocab = tokenizer.get_vocab()
    texts, types = [], []
    for text in sorted(vocab, key=vocab.__getitem__):
        is_control = text in WORD_TOKENS[:5]
        types.append(gguf.TokenType.CONTROL if is_control else gguf.TokenType.NORMAL)
        texts.append(text if is_control else text[2:] if text.startswith("##") else f"▁{text}")
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    for name, token_id in (("unk", 1), ("sep", 3), ("pad", 0), ("mask", 4)):
        getattr(writer, f"add_{name}_token_id")(token_id)


def write_unigram(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    kinds = gguf.TokenType
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _ in PIECES])
    writer.add_token_scores([score for _, score in PIECES])
    controls = [kinds.CONTROL] * 3 + [kinds.UNKNOWN]
    writer.add_token_types([*controls, *[kinds.NORMAL] * (len(PIECES) - 4)])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    for name, token_id in (("bos", 0), ("eos", 2), ("unk", 3), ("pad", 1)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def write_encoder(file: Path, arch: str, model: Any, tokenizer: Any, pooling: str) -> None:
    """A transformers encoder as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), arch)
    is_offset = config.model_type in ("roberta", "xlm-roberta")
    first = config.pad_token_id + 1 if is_offset else 0
    writer.add_context_length(config.max_position_embeddings - first)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(POOLING[pooling]))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    if arch == "nomic-bert":
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_token_type_count(config.type_vocab_size)
    if arch == "modern-bert":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.local_attention)
        writer.add_uint32("modern-bert.attention.sliding_window_pattern", 3)
    write = write_unigram if isinstance(tokenizer.model, models.Unigram) else write_word_piece
    write(writer, tokenizer)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in written(model, arch, first).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(model: Any, arch: str, first: int) -> dict[str, torch.Tensor]:
    """The tensors that a file has, by the names of its checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        if name == "embeddings.position_embeddings.weight":
            tensor = tensor[first:]
        found[name] = tensor
    if arch != "nomic-bert":
        return found
    thirds = [f"self_attn.{part}_proj" for part in "qkv"]
    for layer in range(model.config.num_hidden_layers):
        parts = [found.pop(f"layers.{layer}.{third}.weight") for third in thirds]
        found[f"encoder.layers.{layer}.attn.Wqkv.weight"] = torch.cat(parts)
    own = {
        "self_attn.o_proj": "attn.out_proj",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "mlp.gate_proj": "mlp.fc12",
        "mlp.up_proj": "mlp.fc11",
        "mlp.down_proj": "mlp.fc2",
        "embeddings.LayerNorm": "emb_ln",
    }
    renamed = {}
    for name, tensor in found.items():
        for ours, theirs in own.items():
            name = name.replace(ours, theirs)
        renamed[f"encoder.{name}" if name.startswith("layers.") else name] = tensor
    return renamed


def pooled(states: torch.Tensor, pooling: str) -> torch.Tensor:
    vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return vector / vector.norm()


CASES: dict[str, tuple[str, str, str, Callable[[], Any], dict[str, Any]]] = {
    "BERT": ("bert", "BertModel", "cls", word_piece, {}),
    "BERT, mean": ("bert", "BertModel", "mean", word_piece, {}),
    "XLM-RoBERTa": ("bert", "XLMRobertaModel", "mean", unigram, {"pad_token_id": 1}),
    "Nomic": ("nomic-bert", "NomicBertModel", "mean", word_piece, {"pad_token_id": 0}),
    "ModernBERT": (
        "modern-bert",
        "ModernBertModel",
        "cls",
        word_piece,
        {"local_attention": 16, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    arch, architecture, pooling, make_tokenizer, config = CASES[name]
    size = {"vocab_size": 128, "max_position_embeddings": 100, "num_hidden_layers": 4}
    model = save_encoder(tmp_path, architecture, **size, **config)
    tokenizer = make_tokenizer()
    file = tmp_path / "model.gguf"
    write_encoder(file, arch, model, tokenizer, pooling)
    llm = LLM(str(file), threads=1, dtype="float32", max_num_batched_tokens=64)
    outputs = llm.embed(TEXTS[:3], use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=False):
        token_ids = tokenizer.encode(text).ids
        assert output.prompt_token_ids == token_ids
        with torch.inference_mode():
            states = model(torch.tensor([token_ids])).last_hidden_state[0]
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, pooled(states, pooling), atol=1e-4, rtol=1e-4)


def file_of(
    tmp_path: Path, tokenizer: Any, change: Callable[[gguf.GGUFWriter], None] = lambda _: None
) -> _core.Tokenizer:
    """The tokenizer of a file without a model."""
    file = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(str(file), "bert")
    is_unigram = isinstance(tokenizer.model, models.Unigram)
    (write_unigram if is_unigram else write_word_piece)(writer, tokenizer)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _core.Tokenizer.from_gguf(_core.GgufFile(str(file)))


def test_gemma_4s_texts_are_merged_as_the_file_lists(tmp_path: Path) -> None:
    """Its tokenizer is SentencePiece's alphabet with merges of its own, and bytes for the rest."""
    marked = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [*marked, "▁", *LETTERS, ",", "▁f", "ox", "▁fox", "qu"]
    merges = [("▁", "f"), ("o", "x"), ("▁f", "ox"), ("q", "u")]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    expected = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    expected.normalizer = normalizers.Replace(" ", "▁")
    expected.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    expected.add_special_tokens(marked[:4])
    kinds = gguf.TokenType
    types = [*[kinds.CONTROL] * 3, kinds.UNKNOWN, *[kinds.BYTE] * 256]
    file = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(str(file), "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * len(texts))
    writer.add_token_types(types + [kinds.NORMAL] * (len(texts) - len(types)))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = _core.Tokenizer.from_gguf(_core.GgufFile(str(file)))
    for text in ("a fox, a quick  fox", "fox ☃", " "):
        want = expected.encode(text).ids
        assert list(found.encode(text, True)) == want
        assert found.decode(want, True) == text


@pytest.mark.parametrize("make", [word_piece, unigram])
def test_texts_become_the_ids_that_tokenizers_gives(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    expected = make()
    found = file_of(tmp_path, expected)
    for text in TEXTS:
        for frame in (True, False):
            want = expected.encode(text, add_special_tokens=frame).ids
            assert list(found.encode(text, frame)) == want, text


def test_a_vocabulary_with_capitals_minds_them(tmp_path: Path) -> None:
    expected = word_piece(lowercase=False, cased=True)
    found = file_of(tmp_path, expected)
    assert (
        list(found.encode("Fox fox", False))
        == expected.encode("Fox fox", add_special_tokens=False).ids
    )
    lowers = file_of(
        tmp_path, expected, lambda w: w.add_bool("tokenizer.ggml.normalizer.lowercase", True)
    )
    assert list(lowers.encode("Fox", False)) == list(found.encode("fox", False))


def test_a_table_of_characters_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precompiled_charsmap.* is no table"):
        file_of(tmp_path, unigram(), lambda w: w.add_precompiled_charsmap(b"\x00\x01"))


def test_pooling_that_gives_no_vector_is_refused(tmp_path: Path) -> None:
    model = save_encoder(tmp_path, "BertModel", vocab_size=128)
    file = tmp_path / "model.gguf"
    write_encoder(file, "bert", model, word_piece(), "rank")
    with pytest.raises(ModelLoadError, match="pooling_type 4 is not supported"):
        LLM(str(file), threads=1)
