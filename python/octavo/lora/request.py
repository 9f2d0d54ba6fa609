"""LoRARequest: vLLM's name for an adapter to answer with. octavo has no LoRA yet."""

from __future__ import annotations

from typing import Any, NoReturn


class LoRARequest:
    """Refused: a program that asks for an adapter must not be answered without it.

    Raises:
        NotImplementedError: always.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("octavo has no LoRA yet")
