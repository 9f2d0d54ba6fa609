"""Tokenizer: ids equal to independent implementations', text back, errors that name the cause."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from octavo._core import GgufFile, Tokenizer

WriteGguf = Callable[[Callable[[gguf.GGUFWriter], Any]], str]
# Texts and their ids under SmolLM2's vocabulary, from a plain implementation of its rules (each
# \p{N} by itself, GPT-2's pattern, merges by rank); where a text has no \p{N}, transformers'
# tokenizer of the same file gives these ids too.
SMOLLM2_CASES = json.loads(
    (Path(__file__).parents[1] / "data" / "smollm2_token_ids.json").read_text()
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


# ------------------------------------------------------------------------- SmolLM2 from its GGUF


@pytest.mark.parametrize(("text", "ids"), SMOLLM2_CASES, ids=range(len(SMOLLM2_CASES)))
def test_smollm2_ids(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_its_json_is_the_tokenizer(smollm2: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(smollm2.to_json(), encoding="utf-8")
    read, theirs = Tokenizer.from_file(str(file)), tokenizers.Tokenizer.from_file(str(file))
    assert read.vocab_size == smollm2.vocab_size == theirs.get_vocab_size()
    for text, ids in SMOLLM2_CASES:
        assert read.encode(text) == theirs.encode(text).ids == ids


def test_a_batch_is_its_texts(smollm2: Tokenizer) -> None:
    texts = [text for text, _ in SMOLLM2_CASES]
    assert [smollm2.encode_ids(text) for text in texts] == [ids for _, ids in SMOLLM2_CASES]
    assert smollm2.encode_batch(texts) == [ids for _, ids in SMOLLM2_CASES]
    assert smollm2.encode_batch(texts * 20) == [ids for _, ids in SMOLLM2_CASES] * 20
    assert smollm2.encode_batch([]) == []


def test_special_tokens_are_one_id_and_can_be_left_out(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\nHi<|im_end|>")
    assert ids[0] == smollm2.token_to_id("<|im_start|>") == 1
    assert ids[-1] == smollm2.token_to_id("<|im_end|>") == 2
    assert smollm2.decode(ids) == "user\nHi"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


def test_vocabulary(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert not smollm2.spaces_tokens
    for id in (0, 1, 17, 300, 49151):
        token = smollm2.id_to_token(id)
        assert token is not None
        assert smollm2.token_to_id(token) == id
    assert smollm2.id_to_token(49152) is None
    assert smollm2.token_to_id("no such token") is None
    assert smollm2.decode([49152, 2**32 - 1]) == ""
    with pytest.raises(OverflowError):
        smollm2.decode([-1])


# SmolLM2's vocabulary lacks some control characters and the planes from U+40000 on.
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF)))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert b"".join(smollm2.token_bytes(id) for id in ids) == text.encode()


def test_a_long_text_has_the_ids_of_its_words(smollm2: Tokenizer) -> None:
    """Long texts are encoded in parts, which must not show."""
    words = [text for text, _ in SMOLLM2_CASES if text.isascii() and text.isalpha()]
    text = " ".join(words * 20_000)
    ids = smollm2.encode(words[0]) + [
        id for word in (words * 20_000)[1:] for id in smollm2.encode(" " + word)
    ]
    assert len(text) > 10**6
    assert smollm2.encode(text) == ids


def test_token_bytes_are_the_parts_of_a_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("①")
    assert len(ids) == 3
    assert [smollm2.token_bytes(id) for id in ids] == [b"\xe2", b"\x91", b"\xa0"]
    assert smollm2.token_bytes(1) == b"<|im_start|>"
    assert smollm2.token_bytes(10**6) == b""


def test_lone_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        smollm2.encode("\ud800")


def test_building_is_fast_enough_to_go_unnoticed(smollm2_path: str) -> None:
    file = GgufFile(smollm2_path)
    start = time.thread_time()  # of this thread alone: other tests may have the cores
    Tokenizer.from_gguf(file)
    assert time.thread_time() - start < 1.0  # 0.06 s


def test_long_texts_leave_the_gil(smollm2: Tokenizer) -> None:
    text = "All happy families are alike. " * 20_000
    done = threading.Event()

    def encode() -> None:
        smollm2.encode(text)
        done.set()

    thread = threading.Thread(target=encode)
    start = time.perf_counter()
    thread.start()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    elapsed = time.perf_counter() - start
    thread.join()
    # Held, the GIL would let this thread run once or twice.
    assert ticks > elapsed / 0.001 / 10


# ------------------------------------------------------------------------- other byte-level files

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_file(pre: str | None, **flags: Any) -> Callable[[gguf.GGUFWriter], None]:
    """256 byte tokens, a few merges, two special tokens."""
    merges = ["a b", "ab c", "1 2", "12 3", "Ġ a", "' S"]
    tokens = [*BYTES, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>", "<tool>"]

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("gpt2")
        if pre is not None:
            w.add_tokenizer_pre(pre)
        w.add_token_list(tokens)
        w.add_token_types([*[NORMAL] * (len(tokens) - 3), CONTROL, CONTROL, USER_DEFINED])
        w.add_token_merges(merges)
        w.add_bos_token_id(tokens.index("<s>"))
        w.add_eos_token_id(tokens.index("</s>"))
        if "add_bos" in flags:
            w.add_add_bos_token(flags["add_bos"])
        if "add_eos" in flags:
            w.add_add_eos_token(flags["add_eos"])

    return fill


def pieces(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[str | None]:
    return [tokenizer.id_to_token(id) for id in tokenizer.encode(text, add_special_tokens)]


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("smollm", ["1", "2", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("gpt-2", ["123"]),
        ("llama-bpe", ["123"]),
        ("default", ["123"]),
        (None, ["123"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(
    pre: str | None, digits: list[str], write_gguf: WriteGguf
) -> None:
    tokenizer = Tokenizer.from_gguf(GgufFile(write_gguf(byte_level_file(pre))))
    assert pieces(tokenizer, "123") == digits
    assert pieces(tokenizer, "abc abc<tool>") == ["abc", "Ġ", "abc", "<tool>"]


def test_contractions_ignore_case_where_the_pattern_does(write_gguf: WriteGguf) -> None:
    for pre, ids in (("llama-bpe", ["'S"]), ("qwen2", ["'S"]), ("gpt-2", ["'", "S"])):
        tokenizer = Tokenizer.from_gguf(GgufFile(write_gguf(byte_level_file(pre))))
        assert pieces(tokenizer, "'S") == ids, pre


PRE_TOKENIZERS = """
    default gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling
    smollm starcoder refact command-r codeshell exaone minerva-7b mellum2 falcon llama3 llama-v3
    llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe qwen2
    deepseek-r1-qwen stablelm2 megrez hunyuan solar-open grok-2 kormo qwen35 gpt-4o llama4
    kanana2 minimax-m2 tekken deepseek-v3 hunyuan-dense deepseek-coder seed-coder
"""


@pytest.mark.parametrize("pre", PRE_TOKENIZERS.split())
def test_every_known_pre_tokenizer_loses_nothing(pre: str, write_gguf: WriteGguf) -> None:
    tokenizer = Tokenizer.from_gguf(GgufFile(write_gguf(byte_level_file(pre))))
    for text, _ in SMOLLM2_CASES:
        composed = text.replace("e\u0301", "é").replace("n\u0303", "ñ")
        assert tokenizer.decode(tokenizer.encode(text, False), False) in (text, composed)


def test_bos_and_eos_follow_the_keys(write_gguf: WriteGguf) -> None:
    def ends(pre: str, **flags: Any) -> list[str | None]:
        tokenizer = Tokenizer.from_gguf(GgufFile(write_gguf(byte_level_file(pre, **flags))))
        assert pieces(tokenizer, "x") == ["x"]
        return pieces(tokenizer, "x", add_special_tokens=True)

    assert ends("gpt-2") == ["x"]
    assert ends("gpt-2", add_bos=True) == ["<s>", "x"]
    assert ends("gpt-2", add_eos=True) == ["x", "</s>"]
    assert ends("gpt-2", add_bos=True, add_eos=True) == ["<s>", "x", "</s>"]
    assert ends("llama-bpe") == ["<s>", "x"]
    assert ends("llama-bpe", add_bos=False) == ["x"]


def test_what_is_not_known_is_named(write_gguf: WriteGguf) -> None:
    def refused(fill: Callable[[gguf.GGUFWriter], Any], match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            Tokenizer.from_gguf(GgufFile(write_gguf(fill)))
        assert "model.gguf: " in str(error.value)
        assert "\n" not in str(error.value)

    refused(byte_level_file("martian"), '"martian" is not supported')
    refused(lambda w: w.add_tokenizer_model("rwkv"), '"rwkv" is not supported')
    refused(lambda w: None, "has no tokenizer")
    refused(lambda w: w.add_tokenizer_model("gpt2"), r"tokenizer\.ggml\.tokens.* is absent")

    def duplicate(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["a", "b", "a"])

    refused(duplicate, '"a" has two ids, 0 and 2')

    def bad_merge(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["a", "b"])
        w.add_token_merges(["a b"])

    refused(bad_merge, "merge 0 .* is not two tokens that make a third")


# ------------------------------------------------------------------------- SentencePiece files

PIECES = {
    "▁": -1.0,
    "a": -2.0,
    "b": -3.0,
    "c": -4.0,
    "▁a": -5.0,
    "ab": -6.0,
    "bc": -5.5,
    "abc": -8.0,
    "▁ab": -7.0,
    "▁abc": -9.0,
    "▁▁": -10.0,
    "ca": -6.5,
    "cab": -6.2,
    "é": -11.0,
}


def sentence_piece_file(**flags: Any) -> Callable[[gguf.GGUFWriter], None]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<u>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED]

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores([*[0.0] * 259, *PIECES.values(), 0.0])
        w.add_token_types(types)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        if "add_space_prefix" in flags:
            w.add_add_space_prefix(flags["add_space_prefix"])
        if "add_bos" in flags:
            w.add_add_bos_token(flags["add_bos"])

    return fill


def by_score(text: str) -> list[str]:
    """SentencePiece's BPE, plainly: join the best-scored neighbours, leftmost first."""
    symbols = list(text)
    while True:
        pairs = [
            (-PIECES[symbols[i] + symbols[i + 1]], i)
            for i in range(len(symbols) - 1)
            if symbols[i] + symbols[i + 1] in PIECES
        ]
        if not pairs:
            break
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [
        piece
        for symbol in symbols
        for piece in (
            [symbol] if symbol in PIECES else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        )
    ]


@given(text=st.text("abc é\n本", max_size=30))
@settings(max_examples=300, deadline=None)
def test_sentence_piece_joins_by_score(spm: Tokenizer, text: str) -> None:
    expected = by_score(("▁" + text.replace(" ", "▁")) if text else "")
    assert pieces(spm, text) == expected
    assert spm.decode(spm.encode(text)) == text


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sentence_piece_file()(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer.from_gguf(GgufFile(str(path)))


def test_sentence_piece_special_tokens(spm: Tokenizer, write_gguf: WriteGguf) -> None:
    assert pieces(spm, "abc", add_special_tokens=True) == ["<s>", "▁abc"]
    # A space is put before each stretch of text, as the reference does.
    assert pieces(spm, "<s>ab<u>c</s>") == ["<s>", "▁ab", "<u>", "▁", "c", "</s>"]
    assert spm.decode(spm.encode("ab<u></s>")) == "ab<u>"
    bare = Tokenizer.from_gguf(
        GgufFile(write_gguf(sentence_piece_file(add_space_prefix=False, add_bos=False)))
    )
    assert pieces(bare, "abc", add_special_tokens=True) == ["abc"]
    assert bare.decode(bare.encode(" abc")) == " abc"


def test_sentence_piece_token_bytes(spm: Tokenizer) -> None:
    assert spm.token_bytes(3 + 0xE6) == b"\xe6"
    for piece, expected in (("▁abc", b" abc"), ("é", "é".encode()), ("</s>", b"</s>")):
        id = spm.token_to_id(piece)
        assert id is not None
        assert spm.token_bytes(id) == expected


# ------------------------------------------------------------------------- tokenizer.json


def test_from_file_neither_cuts_nor_pads(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "hello": 1, "world": 2, "[PAD]": 3}
    reference = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    reference.pre_tokenizer = pre_tokenizers.Whitespace()
    reference.enable_truncation(2)
    reference.enable_padding(length=8, pad_id=3, pad_token="[PAD]")
    path = tmp_path / "tokenizer.json"
    reference.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.encode("hello world hello mars") == [1, 2, 1, 0]
    assert tokenizer.decode([1, 2]) == "hello world"
    assert tokenizer.vocab_size == 4


def test_from_file_token_bytes_of_word_pieces(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "play": 1, "##ing": 2}
    reference = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    reference.decoder = decoders.WordPiece()
    path = tmp_path / "tokenizer.json"
    reference.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.decode(tokenizer.encode("playing")) == "playing"
    assert [tokenizer.token_bytes(id) for id in (1, 2, 9)] == [b" play", b"ing", b""]
    assert tokenizer.spaces_tokens


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"version": "9"}', "\x00\xff"])
def test_from_file_errors_are_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as error:
        Tokenizer.from_file(str(path))
    assert "\n" not in str(error.value)
