"""ModelSizes: what a model's weights take in each format, known before they are loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from octavo.models.source import ModelSource

# Bytes a number: those of matrices in layers, of experts, and of the embedding and the output head.
# The formats are those of checkpoints/quantize.py: blocks of 32 with a scale (and a minimum) of two
# bytes on a CPU, groups of 128 with a scale on a GPU, where experts, embedding and head stay
# bfloat16.
_CPU: Final = {
    "bfloat16": (2.0, 2.0, 2.0),
    "-q w8": (34 / 32, 34 / 32, 34 / 32),
    "-q w4": (20 / 32, 20 / 32, 34 / 32),
}
_GPU: Final = {
    "bfloat16": (2.0, 2.0, 2.0),
    "-q fp8": (1.0, 2.0, 2.0),
    "-q w4": (0.5 + 2 / 128, 2.0, 2.0),
}
# Names of tensors in safetensors and in GGUF files.
_HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out)\.|^output\.")
_EMBEDDING: Final = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|token_embd)\.")
_EXPERT: Final = re.compile(r"\.experts\.|_exps\.")


@dataclass(frozen=True, slots=True)
class FormatSize:
    """One format of a model.

    Attributes:
        name: as a flag says it.
        weight_bytes: of all weights.
        read_bytes: of those that one token of one stream reads.
    """

    name: str
    weight_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """Numbers of one part of a model, and their bytes in the files."""

    num_values: int = 0
    num_bytes: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.num_values + other.num_values, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of one model.

    Attributes:
        layers, experts, wide: those of layers, of experts in them, and of the embedding and the
            output head.
        is_quantized: by whoever made the files; of packed files bytes alone are meaningful.
        active_experts: the part of all experts that a token meets.
        head: the part of ``wide`` that a token reads: of an embedding it is one row.
    """

    layers: Part
    experts: Part
    wide: Part
    is_quantized: bool
    active_experts: float
    head: float

    @classmethod
    def of(cls, source: ModelSource) -> ModelSizes:
        """Those of a model's files, whose weights are not read.

        Raises:
            ModelLoadError: the files cannot be read.
        """
        from octavo.checkpoints.schemes.dense import DenseScheme

        config = source.model_config
        parts = {"layers": Part(), "experts": Part(), "wide": Part()}
        has_head = False
        for name, part in _tensors(source):
            is_head = _HEAD.search(name) is not None
            has_head |= is_head
            if is_head or _EMBEDDING.search(name):
                parts["wide"] += part
            else:
                parts["experts" if _EXPERT.search(name) else "layers"] += part
        is_dense = source.gguf is None and isinstance(source.scheme, DenseScheme)
        share = config.num_experts_per_token / config.num_experts if config.num_experts else 1.0
        # An embedding that is the head as well is read as a whole.
        return cls(
            **parts,
            is_quantized=not is_dense,
            active_experts=share,
            head=0.5 if has_head else 1.0,
        )

    def formats(self, *, on_gpu: bool) -> list[FormatSize]:
        """Those that a device can hold it in, the largest first."""
        if self.is_quantized:
            layers, experts, wide = (
                float(part.num_bytes) for part in (self.layers, self.experts, self.wide)
            )
            return [self._size("as it is", layers, experts, wide)]
        found = []
        parts = (self.layers, self.experts, self.wide)
        for name, bytes_each in (_GPU if on_gpu else _CPU).items():
            sizes = (part.num_values * each for part, each in zip(parts, bytes_each, strict=True))
            found.append(self._size(name, *sizes))
        return found

    def _size(self, name: str, layers: float, experts: float, wide: float) -> FormatSize:
        read = layers + experts * self.active_experts + wide * self.head
        return FormatSize(name, int(layers + experts + wide), int(read))


def _tensors(source: ModelSource) -> Iterator[tuple[str, Part]]:
    if source.gguf is not None:
        for name, (shape, _, _, num_bytes) in source.gguf.tensors().items():
            yield name, Part(math.prod(shape), num_bytes)
        return
    from octavo.checkpoints.safetensors import read_entries, safetensors_files

    for file in safetensors_files(source.path):
        for entry in read_entries(file):
            yield entry.name, Part(math.prod(entry.shape), entry.end - entry.begin)
