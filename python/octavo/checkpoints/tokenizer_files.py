"""TokenizerFiles: a tokenizer.json, and what the files beside it add to it.

Many checkpoints add tokens without writing tokenizer.json again: transformers completes it from
``added_tokens_decoder`` and ``additional_special_tokens`` in tokenizer_config.json or, where there
is no ``added_tokens_decoder``, from special_tokens_map.json and added_tokens.json. The order and
the flags here are those of transformers 5 (``PreTrainedTokenizerBase._from_pretrained``,
``TokenizersBackend.__init__``).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from octavo._core import Tokenizer
from octavo.checkpoints.json_file import read_json_if_there

logger = logging.getLogger("octavo.checkpoints")

# The names that every tokenizer of transformers has; others end alike (``image_token``).
_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Lists of further special tokens, by their old and their new name.
_LISTS: Final = ("extra_special_tokens", "additional_special_tokens")
# The names of tokens that end an answer, or its turn.
_ENDS: Final = ("eos_token", "eot_token", "eom_token")
# Classes of transformers that build their splitting anew from ``add_prefix_space``; all others keep
# what tokenizer.json has.
_BYTE_LEVEL_CLASSES: Final = frozenset(
    {
        "BartTokenizer",
        "BlenderbotTokenizer",
        "CodeGenTokenizer",
        "CohereTokenizer",
        "DebertaTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "LEDTokenizer",
        "LongformerTokenizer",
        "LukeTokenizer",
        "MarkupLMTokenizer",
        "Qwen2Tokenizer",
        "Qwen3_5Tokenizer",
        "RobertaTokenizer",
        "WhisperTokenizer",
    }
)
_METASPACE_CLASSES: Final = frozenset(
    {
        "AlbertTokenizer",
        "BarthezTokenizer",
        "BigBirdTokenizer",
        "CamembertTokenizer",
        "CodeLlamaTokenizer",
        "DebertaV2Tokenizer",
        "LlamaTokenizer",
        "RemBertTokenizer",
        "XGLMTokenizer",
        "XLMRobertaTokenizer",
    }
)


class AddedToken(NamedTuple):
    """A token cut out of a text before anything else; fields as in the core."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer.

    ``file``: the tokenizer.json. Properties read lazily and only once.

    Raises:
        ModelLoadError: from every property, naming the file that is no JSON object.
    """

    file: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, {} where there is none."""
        return read_json_if_there(self.file.with_name("tokenizer_config.json"))

    @cached_property
    def special_tokens_map(self) -> dict[str, Any]:
        """special_tokens_map.json, {} where there is none."""
        return read_json_if_there(self.file.with_name("special_tokens_map.json"))

    @cached_property
    def named_tokens(self) -> dict[str, str | None]:
        """Name -> text, as ``bos_token`` -> ``<s>``; None where a file has null."""
        named: dict[str, str | None] = {}
        for name, value in self._settings(everything=True).items():
            if name.endswith("_token"):
                text = _text(value)
                if text is not None or value is None:
                    named[name] = text
        return named

    @property
    def end_texts(self) -> list[str]:
        """The texts of tokens that end an answer, by either file."""
        sources = (self.config, self.special_tokens_map)
        texts = (_text(source.get(name)) for source in sources for name in _ENDS)
        return [text for text in dict.fromkeys(texts) if text]

    def load(self, *, frames: bool = True) -> Tokenizer:
        """The tokenizer, completed. Tokens that cannot be added as they are meant are logged.

        ``frames``: it puts its special tokens around a text.

        Raises:
            ValueError: tokenizer.json does not describe a tokenizer.
            OSError: it cannot be read.
        """
        tokenizer = Tokenizer.from_file(str(self.file)) if frames else self._unframed()
        present = {token[0]: AddedToken(*token) for _, token in tokenizer.added_tokens()}
        stated = self._stated_tokens(tokenizer)
        wanted = self._wanted_tokens(present, stated)
        prefix_space = self._prefix_space()
        if wanted or prefix_space is not None:
            tokenizer = tokenizer.changed(wanted, prefix_space)
        for token_id, token in stated.items():
            if token.content and (found := tokenizer.token_to_id(token.content)) != token_id:
                self._warn(f"token {token.content!r} has id {found}, not {token_id} as is stated")
        return tokenizer

    def _unframed(self) -> Tokenizer:
        values = json.loads(self.file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as changed:
            json.dump({**values, "post_processor": None}, changed)
            changed.flush()
            return Tokenizer.from_file(changed.name)

    def _settings(self, *, everything: bool) -> dict[str, Any]:
        """tokenizer_config.json with special_tokens_map.json.

        Newer files have all in the first. ``everything``: the second still fills in names that
        the first does not have.
        """
        if "added_tokens_decoder" in self.config:
            return {**(self.special_tokens_map if everything else {}), **self.config}
        return {**self.config, **self.special_tokens_map}

    def _stated_tokens(self, tokenizer: Tokenizer) -> dict[int, AddedToken]:
        """The added tokens whose ids the files state, by id."""
        stated = self.config.get("added_tokens_decoder")
        if isinstance(stated, Mapping):
            return dict(self._decoder_tokens(stated))
        file = self.file.with_name("added_tokens.json")
        special = set(self._special_texts())
        tokens = {}
        for text, token_id in read_json_if_there(file).items():
            if not text or isinstance(token_id, bool) or not isinstance(token_id, int):
                self._warn(f"added_tokens.json: token {text!r} cannot be added as {token_id!r}")
            else:
                tokens[token_id] = AddedToken(text, text in special, text not in special)
        # What tokenizer.json has under an id stays.
        return {**tokens, **{i: AddedToken(*token) for i, token in tokenizer.added_tokens()}}

    def _decoder_tokens(self, stated: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
        for key, value in stated.items():
            token = _added_token(value)
            if token is None or not token.content or not key.isdecimal():
                shown = repr(value)[:100]
                self._warn(f"added_tokens_decoder: token {key!r} cannot be added: {shown}")
            else:
                yield int(key), token

    def _wanted_tokens(
        self, present: Mapping[str, AddedToken], stated: Mapping[int, AddedToken]
    ) -> list[AddedToken]:
        """Tokens that tokenizer.json lacks, in the order in which they get their ids."""
        there = set(present.values())
        wanted = [token for _, token in sorted(stated.items()) if token not in there]
        known = {*present, *(token.content for token in wanted)}
        settings = self._settings(everything=False)
        for name, value in [*_named(settings), *self._listed()]:
            token = _added_token(value, is_special=True)
            if token is None or not token.content:
                if value is not None:
                    self._warn(f"{name}: {repr(value)[:100]} cannot be added")
            elif token.content not in known:
                known.add(token.content)
                wanted.append(token)
        named = {_text(value) for _, value in _named(settings)}
        return [t._replace(special=True) if t.content in named else t for t in wanted]

    def _special_texts(self) -> Iterable[str | None]:
        settings = self._settings(everything=False)
        return (_text(value) for _, value in [*_named(settings), *self._listed()])

    def _listed(self) -> list[tuple[str, Any]]:
        """(name of the list, token) of further special tokens."""
        own = _first_list(self.config)
        if "added_tokens_decoder" not in self.config:
            # The map's list under the new name comes on top, under the old one in its place.
            new, old = _LISTS
            own += _first_list({new: self.special_tokens_map.get(new)})
            own = own or _first_list({old: self.special_tokens_map.get(old)})
        return own

    def _prefix_space(self) -> tuple[Literal["ByteLevel", "Metaspace"], bool] | None:
        value = self.config.get("add_prefix_space")
        name = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        if isinstance(value, bool):
            if name in _BYTE_LEVEL_CLASSES:
                return "ByteLevel", value
            if name in _METASPACE_CLASSES:
                return "Metaspace", value
        return None

    def _warn(self, message: str) -> None:
        logger.warning("%s: %s", self.file.parent, message)


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, token) of named special tokens."""
    own = settings.get("extra_special_tokens")
    for name, value in {**settings, **(own if isinstance(own, dict) else {})}.items():
        is_own = isinstance(own, dict) and name in own
        is_text_name = name.endswith("_token") and isinstance(value, str)
        if name in _NAMES or is_own or is_text_name:
            yield name, value


def _first_list(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, token) of the first list that holds any."""
    for name in _LISTS:
        tokens = settings.get(name)
        if isinstance(tokens, list) and tokens:
            return [(name, token) for token in tokens]
    return []


def _text(value: Any) -> str | None:
    """A token's text: written as it is, or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_token(value: Any, *, is_special: bool | None = None) -> AddedToken | None:
    """A token from its text or object; None of anything else. ``is_special`` None: as it says."""
    text = _text(value)
    if text is None or (isinstance(value, str) and is_special is None):
        return None
    flags = value if isinstance(value, dict) else {}
    special = bool(flags.get("special", False)) if is_special is None else is_special
    return AddedToken(
        text,
        special,
        bool(flags.get("normalized", not special)),
        bool(flags.get("lstrip", False)),
        bool(flags.get("rstrip", False)),
        bool(flags.get("single_word", False)),
    )
