"""GgufFacts: what of a model's shape only a GGUF file's tensors hold; and keys with a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from octavo.errors import ModelLoadError
from octavo.models.config import Getter


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """Facts that only the tensors hold.

    ``vocab_size``: rows of ``token_embd``; ``tied``: there is no ``output.weight``; ``biases``:
    the modules that have one in any layer; ``modules``: each one's layers; ``freq_factors``: the
    tensor ``rope_freqs.weight``; ``short_factors``, ``long_factors``: Phi-3's two;
    ``laurel_rank``: rows of Gemma 3n's ``laurel_l``.
    """

    vocab_size: int
    tied: bool
    biases: frozenset[str] = frozenset()
    modules: Mapping[str, frozenset[int]] = field(default_factory=dict)
    freq_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    laurel_rank: int = 0


def of_layers(get: Getter, key: str, default: int | None = None) -> list[int]:
    """A whole number for each layer; files have a list of them, or one for all.

    Raises:
        ModelLoadError: it is missing, of another kind, or not as long as there are layers.
    """
    layers = get.int("block_count")
    found = get.values.get(f"{get.prefix}{key}")
    if not isinstance(found, Sequence) or isinstance(found, str):
        return [get.int(key, default)] * layers
    if len(found) != layers or not all(isinstance(value, int) for value in found):
        raise ModelLoadError(f"GGUF: {get.prefix}{key} must be {layers} whole numbers")
    return list(found)
