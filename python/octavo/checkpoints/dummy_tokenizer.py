"""A tokenizer for a model's shape without its files, for ``--load-format dummy``.

Bytes are tokens, so any text can be encoded; every other id of the vocabulary decodes to a short
word, so that streams of random ids carry about as much text as real ones.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from octavo._core import Tokenizer


def _byte_letters() -> list[str]:
    """The printable letters that byte-level BPE writes bytes as, by byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(kept)))
    return [letters[byte] for byte in range(256)]


def dummy_tokenizer_json(vocab_size: int) -> str:
    """A tokenizer.json: ids below 256 are bytes, as far as the vocabulary reaches, others words."""
    letters = _byte_letters()
    vocab = {letter: i for i, letter in enumerate(letters[:vocab_size])}
    space = letters[ord(" ")]
    vocab |= {f"{space}{i:x}": i for i in range(len(vocab), vocab_size)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    description: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return json.dumps(description)


def make_dummy_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer of ``dummy_tokenizer_json``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(dummy_tokenizer_json(vocab_size))
        return Tokenizer.from_file(str(file))
