"""ScriptedEngine: a FakeEngine that says what a script has for the turn a conversation is at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fake_engine import FakeEngine

from families import FAMILIES
from octavo.sampling_params import SamplingParams

QWEN3 = next(family for family in FAMILIES if family.template == "qwen3")


def call(name: str, arguments: str, thought: str = "Hm.") -> str:
    """A turn of Qwen3's that thinks and calls a tool."""
    return (
        f"<think>\n{thought}\n</think>\n\n"
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    )


class ScriptedEngine(FakeEngine):
    """The turn is the number of tools' results in the prompt; the last line is said from then on.

    ``prompts``: every prompt's text, in order.
    """

    def __init__(self, turns: Sequence[str], max_model_len: int = 1 << 17) -> None:
        super().__init__(max_model_len=max_model_len)
        self.chat_template = QWEN3.source
        self.turns = list(turns)
        self.prompts: list[str] = []

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        sink: Callable[[Any], None],
        **options: Any,
    ) -> list[int]:
        prompt = self.tokenizer.decode(list(prompt_token_ids), False)
        self.prompts.append(prompt)
        turn = min(prompt.count("<tool_response>"), len(self.turns) - 1)
        said = self.turns[turn]
        if prompt.rstrip().endswith("</think>"):
            # The prompt asks for no reasoning.
            said = said.partition("</think>\n\n")[2] or said
        self.said = said
        return super().submit(prompt_token_ids, params, sink, **options)
