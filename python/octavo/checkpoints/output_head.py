"""Output heads of models whose config ties them to the embedding: what the file holds decides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoints.safetensors import open_safetensors

logger = logging.getLogger("octavo.checkpoints")

HEAD = "lm_head.weight"
# What stands in its place where the head is quantized: GPTQ and AWQ, compressed-tensors.
_QUANTIZED_HEADS = ("lm_head.qweight", "lm_head.weight_packed")
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")
# Rows compared at a time: a few megabytes.
_ROWS = 1024


def has_own_head(files: Sequence[Path]) -> bool:
    """True where these safetensors files hold an output head that differs from the embedding.

    Fine-tunes are saved with a head of their own under a config that still ties it; transformers 5
    uses what is there. A quantized head differs from the embedding, which is not quantized. Many
    others hold a copy of the embedding, which is read once. Logs the first. O(vocabulary) where
    there is a dense head, else a look at the names.

    Raises:
        ModelLoadError: a file is cut short, or of another kind.
    """
    found: dict[str, Any] = {}
    for file in files:
        handle = open_safetensors(file, torch.device("cpu"))
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in _QUANTIZED_HEADS:
                return True
            if name == HEAD or name.endswith(_EMBEDDINGS):
                found[name] = handle
    head = found.pop(HEAD, None)
    if head is None or len(found) != 1:
        return False
    ((name, embedding),) = found.items()
    if _are_equal(head.get_slice(HEAD), embedding.get_slice(name)):
        return False
    logger.warning(
        "%s: config.json ties the output head to %s, but the file's %s differs and is used",
        files[0].parent,
        name,
        HEAD,
    )
    return True


def _are_equal(first: Any, second: Any) -> bool:
    shape = first.get_shape()
    if shape != second.get_shape() or first.get_dtype() != second.get_dtype():
        return False
    return all(
        torch.equal(first[at : at + _ROWS], second[at : at + _ROWS])
        for at in range(0, shape[0], _ROWS)
    )
