"""Tokenizers trained here, written as GGUF or tokenizer.json: the ids are those of their own
libraries, on text that is hard to split."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from octavo._core import GgufFile, Tokenizer

WriteGguf = Callable[[Callable[[gguf.GGUFWriter], Any]], str]

DIFFICULT = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n\t\t  \r\n",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces   three    four",
    "tabs\tand\nnew\n\nlines\n \n",
    "don't I'll we've HE'S they'd 'tis ''s",
    "3.14159 1,000,000 007 12345678901 x2y3",
    "camelCase snake_case kebab-case SHOUTING",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "café cafe\u0301 naïve Ångström",
    "日本語のテキスト、漢字とかな。",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "🙂👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈 emoji🇨🇭",
    "\u00a0non\u2009breaking\u3000spaces\u200bzero\ufeffwidth",
    "ﬁ ligature ½ ² Ⅷ \uff10\uff11\uff12 full-width",
    "a\u0000b\u0007\u001b[0m control",
    "https://example.com/a?b=c&d=%20#e user@example.org",
    "<s> </s> <unk> <0x41> ▁ ▁▁ literal ▁marks",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===~~~```'''\"\"\"",
    "\U0010ffff\ue000\ufffd",
]
CORPUS = (Path(__file__).read_text() + Path(tokenizers.__file__).read_text()).splitlines() * 3
CORPUS += ["Hello world, this is the text that the tokenizer learns from; don't they'll 1234"] * 20


def write_spm(processor: Any, user_spaces: bool) -> Callable[[gguf.GGUFWriter], None]:
    """The keys of a SentencePiece model, as llama.cpp's converter writes them."""
    types = {
        "is_unknown": gguf.TokenType.UNKNOWN,
        "is_control": gguf.TokenType.CONTROL,
        "is_byte": gguf.TokenType.BYTE,
    }
    tokens, kinds, scores = [], [], []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        kind = next((k for name, k in types.items() if getattr(processor, name)(i)), None)
        if kind is None:
            kind = gguf.TokenType.NORMAL
            if piece in USER_DEFINED:
                kind = gguf.TokenType.USER_DEFINED
                if user_spaces:
                    piece = piece.replace("▁", " ")
        tokens.append(piece)
        kinds.append(kind)
        scores.append(processor.get_score(i))

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores(scores)
        w.add_token_types(kinds)
        w.add_bos_token_id(processor.bos_id())
        w.add_eos_token_id(processor.eos_id())
        w.add_unk_token_id(processor.unk_id())

    return fill


# Gemma's: runs of white space, and markup.
USER_DEFINED = ["\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "<start_of_turn>"]


def train_spm(**options: Any) -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentence_piece_of_llama_2(write_gguf: WriteGguf) -> None:
    processor = train_spm()
    ours = Tokenizer.from_gguf(GgufFile(write_gguf(write_spm(processor, user_spaces=False))))
    for text in DIFFICULT:
        if any(mark in text for mark in ("<s>", "</s>")):
            continue  # a control token in a text is one id here, as in transformers
        assert ours.encode(text, add_special_tokens=False) == processor.encode(text), text
        assert ours.encode(text) == [processor.bos_id(), *processor.encode(text)]
        assert ours.decode(processor.encode(text)) == text


@pytest.mark.parametrize("user_spaces", [False, True])
def test_sentence_piece_of_gemma(write_gguf: WriteGguf, user_spaces: bool) -> None:
    """Without a space in front; converters write user-defined runs of spaces in either way."""
    processor = train_spm(add_dummy_prefix=False, user_defined_symbols=USER_DEFINED)
    fill = write_spm(processor, user_spaces)

    def bare(w: gguf.GGUFWriter) -> None:
        fill(w)
        w.add_add_space_prefix(False)

    ours = Tokenizer.from_gguf(GgufFile(write_gguf(bare)))
    for text in [*DIFFICULT, "a<b>c</b><start_of_turn>user\n\n\n\nHi     there"]:
        if any(mark in text for mark in ("<s>", "▁▁")):
            continue
        assert ours.encode(text, add_special_tokens=False) == processor.encode(text), text
        assert ours.decode(processor.encode(text)) == text


# The published patterns of the families; None: GPT-2's own, built into the library.
PATTERNS = {
    "gpt-2": None,
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_bpe(pre: str, write_gguf: WriteGguf) -> None:
    trained = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    pattern = PATTERNS[pre]
    if pattern is None:
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trained.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if pre == "qwen2":
        trained.normalizer = normalizers.NFC()
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    description = transformers.PreTrainedTokenizerFast(tokenizer_object=trained)

    def fill(w: gguf.GGUFWriter) -> None:
        model = json.loads(trained.to_str())["model"]
        ids = sorted(model["vocab"], key=model["vocab"].__getitem__)
        kinds = [gguf.TokenType.CONTROL if t == "<|end|>" else gguf.TokenType.NORMAL for t in ids]
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre)
        w.add_token_list(ids)
        w.add_token_types(kinds)
        w.add_token_merges([" ".join(pair) for pair in model["merges"]])
        w.add_add_bos_token(False)

    ours = Tokenizer.from_gguf(GgufFile(write_gguf(fill)))
    for text in [*DIFFICULT, "a<|end|>b <|end|>\n"]:
        expected = trained.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert description(text)["input_ids"] == expected
        found = ours.decode(expected, skip_special_tokens=False)
        assert found == trained.decode(expected, skip_special_tokens=False)


def word_pieces() -> tokenizers.Tokenizer:
    """BERT's."""
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return trained


def unigram() -> tokenizers.Tokenizer:
    """XLM-RoBERTa's, which multilingual E5 and BGE-M3 have."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "[MASK]"],
        unk_token="<unk>",
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return trained


def metaspace_bpe() -> tokenizers.Tokenizer:
    """Llama 2's and Mistral's: SentencePiece's BPE, with bytes for what it has not learnt."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    # Bytes are ordinary tokens, which no text is searched for.
    raw = json.loads(trained.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in bytes_]
    trained = tokenizers.Tokenizer.from_str(json.dumps(raw))
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    trained.add_special_tokens(["[MASK]"])
    return trained


def byte_level() -> tokenizers.Tokenizer:
    """Llama 3's, Qwen's and GPT-2's kind."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["llama-bpe"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return trained


@pytest.mark.parametrize("train", [word_pieces, unigram, metaspace_bpe, byte_level])
def test_tokenizer_json(train: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    trained = train()
    file = tmp_path / "tokenizer.json"
    trained.save(str(file))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    ours = Tokenizer.from_file(str(file))
    assert ours.vocab_size == trained.get_vocab_size()
    for text in [*DIFFICULT, "a [MASK] b[MASK]c"]:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected, text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == plain, text
        for skip in (True, False):
            found = ours.decode(expected, skip_special_tokens=skip)
            assert found == trained.decode(expected, skip_special_tokens=skip), text
