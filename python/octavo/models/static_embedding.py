"""StaticEmbedding: a vector for each token, looked up, whose mean is the text's; no layers.

As sentence-transformers' module of that name and model2vec's StaticModel store it: a table, and
where many tokens share a row, each token's row and its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.json_file import read_json_if_there
from octavo.checkpoints.safetensors import TENSOR_KINDS, TensorFiles, safetensors_files
from octavo.errors import ModelLoadError
from octavo.layers.context import StepContext
from octavo.layers.rope import RopeConfig
from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig

# model2vec's name for it, in config.json.
STATIC_ARCHITECTURE = "StaticModel"
# A text has no limit of its own; this many tokens are what long-context embedders take.
_MAX_LEN = 32768
# model2vec's own may be these as well.
_KINDS = {**TENSOR_KINDS, "F64": torch.float64}
_TABLES = ("embedding.weight", "embeddings")


def static_config(folder: Path) -> dict[str, Any]:
    """A config.json for a folder's table: its own, if it has one, and the sizes of its tensors.

    Raises:
        ModelLoadError: there is no table.
    """
    tensors = _open(folder, torch.device("cpu"))
    rows, size = tensors.shape(_table(tensors, folder))
    if "mapping" in tensors:
        [rows] = tensors.shape("mapping")
    given = read_json_if_there(folder / "config.json")
    return {
        **given,
        "architectures": [STATIC_ARCHITECTURE],
        "vocab_size": rows,
        "hidden_size": size,
    }


def read_static_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a model that ``static_config`` describes."""
    hf = HfConfig({**raw, "num_hidden_layers": 1}, {})
    return ModelConfig(
        architecture=STATIC_ARCHITECTURE,
        vocab_size=hf.int("vocab_size"),
        hidden_size=hf.int("hidden_size"),
        # Sizes of layers, of which there are none.
        intermediate_size=1,
        num_layers=1,
        # There are no keys and values: the cache is as small as one can be.
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        rms_norm_eps=0.0,
        rope=RopeConfig(theta=1.0, rot_dim=2),
        max_position_embeddings=_MAX_LEN,
        max_context_len=_MAX_LEN,
        dtype="float32",
        raw=dict(raw),
    )


class StaticEmbedding:
    """The table of a folder, float32 [V, D] on ``device``.

    Raises:
        ModelLoadError: a tensor is missing, misshapen or of another kind.
    """

    def __init__(self, config: ModelConfig, folder: Path, device: torch.device) -> None:
        tensors = _open(folder, device)
        name = _table(tensors, folder)
        table = tensors.read(name, tensors.shape(name), kinds=_KINDS)
        sizes = (config.vocab_size,)
        if "mapping" in tensors:
            rows = tensors.read("mapping", sizes, kinds=_KINDS).long()
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table.shape[0]:
                raise ModelLoadError(f"{folder}: tensor mapping names rows outside of {name}")
            table = table[rows]
        if "weights" in tensors:
            weights = tensors.read("weights", sizes, kinds=_KINDS)
            table = table.double() * weights.double()[:, None]
        self._table = table.float()

    def __call__(self, ids: Tensor, ctx: StepContext, is_second: Tensor | None) -> Tensor:
        """Token ids int32 [T] -> [T, D]."""
        return self._table[ids]


def _open(folder: Path, device: torch.device) -> TensorFiles:
    files = safetensors_files(folder)
    if not files:
        raise ModelLoadError(f"{folder}: holds no *.safetensors")
    return TensorFiles(files, device=device, dtype=None, progress=lambda _: None, take=None)


def _table(tensors: TensorFiles, folder: Path) -> str:
    name = next((name for name in _TABLES if name in tensors), None)
    if name is None or len(tensors.shape(name)) != 2:
        raise ModelLoadError(f"{folder}: no table of vectors, {' or '.join(_TABLES)} [V, D]")
    return name
