"""ColBERT folders: a projection of each token's state, and the forms of queries and documents.

PyLate writes sentence-transformers' modules.json without a pooling module, and its settings into
config_sentence_transformers.json; colbert-ai writes ``linear.weight`` beside the encoder's tensors,
and artifact.metadata. What neither names has PyLate's default.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from octavo._core import Tokenizer
from octavo.checkpoints.json_file import read_json_if_there
from octavo.errors import ModelLoadError
from octavo.text_form import TextForm

# The architectures that colbert-ai, and users of vLLM, give such a checkpoint.
COLBERT_ARCHITECTURES: Final = ("HF_ColBERT", "ColBERTModel", "ColBERTModernBertModel")
# The model_type of config.json -> the encoder.
_TRUNKS: Final = {
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
# colbert-ai's names of PyLate's settings.
_METADATA: Final = {
    "query_prefix": "query_token_id",
    "document_prefix": "doc_token_id",
    "query_length": "query_maxlen",
    "document_length": "doc_maxlen",
    "attend_to_expansion_tokens": "attend_to_mask_tokens",
}
_MASKS: Final = ("[MASK]", "<mask>")


def is_colbert(raw: Mapping[str, Any]) -> bool:
    """True for a config.json of colbert-ai's."""
    names = raw.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in COLBERT_ARCHITECTURES


def colbert_trunk(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the encoder in a checkpoint of colbert-ai's.

    Raises:
        ModelLoadError: an encoder that is not known.
    """
    kind = raw.get("model_type")
    if kind not in _TRUNKS:
        raise ModelLoadError(
            f"config.json: a ColBERT model of type {kind!r} is not supported; "
            f"known: {', '.join(_TRUNKS)}"
        )
    return {**raw, "architectures": [_TRUNKS[kind]]}


def read_forms(
    folder: Path, tokenizer: Tokenizer, mask_token: str | None, max_len: int
) -> dict[str, TextForm]:
    """The forms of a query and of a document.

    ``mask_token``: the tokenizer's, with which queries are filled up. ``max_len``: the model's.

    Raises:
        ModelLoadError: a setting is of another kind, or names no token of the tokenizer.
    """
    settings = _Settings(folder)
    if (similarity := settings.get("similarity", "cosine")) != "cosine":
        raise ModelLoadError(f"{folder}: similarity {similarity!r} of tokens is not supported")
    fills = settings.get("do_query_expansion", True)
    words = settings.get("skiplist_words", list(string.punctuation))
    found = (tokenizer.token_to_id(str(word)) for word in words)

    def prefix(name: str, default: str) -> int | None:
        text = settings.get(name, default)
        token_id = tokenizer.token_to_id(text) if text else None
        if text and token_id is None:
            raise ModelLoadError(f"{folder}: {name} {text!r} is not a token of the tokenizer")
        return token_id

    def length(name: str, default: int) -> int:
        return min(int(settings.get(name, default)), max_len)

    return {
        "query": TextForm(
            max_len=length("query_length", 32),
            prefix=prefix("query_prefix", settings.query_prefix),
            filler=_filler(folder, tokenizer, mask_token) if fills else None,
            attends=bool(settings.get("attend_to_expansion_tokens", False)),
        ),
        "document": TextForm(
            max_len=length("document_length", 180),
            prefix=prefix("document_prefix", settings.document_prefix),
            skipped=frozenset(token_id for token_id in found if token_id is not None),
        ),
    }


class _Settings:
    """PyLate's settings, colbert-ai's where it has written the folder."""

    def __init__(self, folder: Path) -> None:
        metadata = read_json_if_there(folder / "artifact.metadata")
        self._values = {
            name: metadata[theirs]
            for name, theirs in _METADATA.items()
            if metadata.get(theirs) is not None
        }
        if metadata.get("mask_punctuation") is False:
            self._values["skiplist_words"] = []
        if "similarity" in metadata:
            self._values["similarity"] = metadata["similarity"]
        own = read_json_if_there(folder / "config_sentence_transformers.json")
        self._values |= {name: value for name, value in own.items() if value is not None}
        is_of_pylate = (folder / "modules.json").is_file()
        self.query_prefix = "[Q] " if is_of_pylate else "[unused0]"
        self.document_prefix = "[D] " if is_of_pylate else "[unused1]"

    def get(self, name: str, default: Any) -> Any:
        """A setting, of its default's kind.

        Raises:
            ModelLoadError: it is of another.
        """
        value = self._values.get(name, default)
        if type(value) is not type(default):
            raise ModelLoadError(f"{name} of a ColBERT model must be like {default!r}")
        return value


def _filler(folder: Path, tokenizer: Tokenizer, mask_token: str | None) -> int:
    for text in (mask_token, *_MASKS):
        token_id = tokenizer.token_to_id(text) if text else None
        if token_id is not None:
            return token_id
    raise ModelLoadError(f"{folder}: the tokenizer has no mask token to fill queries up with")
