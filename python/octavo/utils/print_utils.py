"""print_embeddings: a vector's first numbers, as vLLM's examples show it."""

from collections.abc import Sequence
from typing import Any

# Numbers that are shown of a longer vector.
_NUM_SHOWN = 4


def print_embeddings(embeds: Sequence[Any], prefix: str = "Embeddings") -> None:
    """Print a vector's first numbers, and how many there are."""
    first = ", ".join(map(str, embeds[:_NUM_SHOWN]))
    more = ", ..." if len(embeds) > _NUM_SHOWN else ""
    print(f"{prefix}: [{first}{more}] (size={len(embeds)})")
