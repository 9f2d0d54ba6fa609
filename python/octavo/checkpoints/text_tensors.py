"""The text model's tensors of a checkpoint: their names, and those of other parts, left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final

from octavo.checkpoints.safetensors import SafetensorsWeights
from octavo.checkpoints.weights import RenamedWeights, Weights

logger = logging.getLogger("octavo.checkpoints")

# What stands before the text model's layers in multimodal files, and before its output head.
_PARTS: Final = (
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
    ("model.text_model.", ""),
)
_MODEL, _TRUNK = "model.", "transformer."


def text_weights(weights: SafetensorsWeights, where: str, is_part: bool) -> Weights:
    """``weights`` under the names that a decoder asks for.

    is_part: the checkpoint has other parts (vision, sound), which are left out with a line in the
        log; ``where`` is its name there.
    """
    names = weights.unread()
    rename = _renaming(names, is_part)
    if is_part:
        own = (rename(_MODEL), rename("lm_head"))
        others = {name for name in names if not name.startswith(own)}
        if own[0] == _MODEL:
            others |= {name for name in names if name.startswith(("model.visual.", "visual."))}
        weights.leave_out(others)
        parts = sorted({".".join(name.split(".")[:2]) for name in others})
        logger.warning(
            "%s: the text model alone is loaded; %d tensors of other parts are left out (%s)",
            where,
            len(others),
            ", ".join(parts[:4]),
        )
    elif not any(name.startswith(_TRUNK) for name in names):
        # Older checkpoints are of the trunk, without its name.
        return RenamedWeights(weights, lambda name: name.removeprefix(_TRUNK))
    return weights if not is_part else RenamedWeights(weights, rename)


def _renaming(names: Collection[str], is_part: bool) -> Callable[[str], str]:
    """A decoder's name -> the file's."""
    for model, head in _PARTS if is_part else ():
        if any(name.startswith(model) for name in names):

            def rename(name: str, model: str = model, head: str = head) -> str:
                rest = name.removeprefix(_MODEL)
                return head + name if rest == name else model + rest

            return rename
    return lambda name: name
