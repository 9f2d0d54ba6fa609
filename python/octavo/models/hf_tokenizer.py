"""hf_tokenizer: a model's tokenizer as transformers has it, for programs that want its methods."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelLoadError

if TYPE_CHECKING:
    from octavo.models.source import ModelSource


def hf_tokenizer(source: ModelSource) -> Any:
    """A ``PreTrainedTokenizerBase``; transformers is imported here.

    A folder's is the one that ``AutoTokenizer`` makes of it. A GGUF file's, or that of a lone
    tokenizer.json, is made of octavo's own: its vocabulary and splitting, the special tokens and
    the chat template that the file names.

    Raises:
        ModelLoadError: transformers cannot read the folder's files.
    """
    files = source.tokenizer_files
    if files is not None and files.file.with_name("tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        folder = files.file.parent
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{folder}: transformers: {error}") from error
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(source.tokenizer.to_json())
        file.flush()
        tokenizer = make(
            tokenizer_file=file.name,
            **source.special_tokens,
            clean_up_tokenization_spaces=False,
        )
    tokenizer.chat_template = source.chat_template
    return tokenizer
