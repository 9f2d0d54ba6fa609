"""read_prompts: the prompts of a sentence-transformers folder."""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoints.json_file import read_json_if_there
from octavo.errors import ModelLoadError
from octavo.task_prompts import TaskPrompts

_FILE = "config_sentence_transformers.json"


def read_prompts(folder: Path, *, pools_them: bool) -> TaskPrompts:
    """The folder's prompts; none where its file is not there.

    ``pools_them``: their tokens are part of what is pooled.

    Raises:
        ModelLoadError: the file holds something else, or a default prompt that is not to be pooled.
    """
    file = folder / _FILE
    values = read_json_if_there(file)
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    is_of_texts = isinstance(prompts, dict) and all(isinstance(t, str) for t in prompts.values())
    if not is_of_texts or (default is not None and default not in prompts):
        raise ModelLoadError(f"{file}: prompts must be texts by name, the default's among them")
    if default is not None and prompts[default] and not pools_them:
        raise ModelLoadError(
            f"{file}: default_prompt_name is not supported where include_prompt is false"
        )
    return TaskPrompts(prompts, default, is_pooled=pools_them)
