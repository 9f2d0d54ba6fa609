"""A toy decoder whose weights can be split over the ranks of a mesh, as a real family's are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.engine import engine_loop
from octavo.kernels import reference
from octavo.kernels.rank import Rank
from octavo.layers.context import StepContext
from octavo.layers.rope import identity_table
from octavo.llm import LLM
from octavo.models.config import ModelConfig
from octavo.models.registry import config_from_hf
from octavo.runner.dtypes import ModelDtypes
from octavo.runner.loading import LoadedModel, ModelPart
from octavo.runner.mesh import Exchange, Mesh, ranks_of
from octavo.sampling_params import SamplingParams

CPU = torch.device("cpu")
CONFIG_JSON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.0, "logit_bias": {7: 4.0}},
]
SHAPE = config_from_hf(CONFIG_JSON)


def weights() -> dict[str, Tensor]:
    """Random, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    d, f, q, kv = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.q_size, SHAPE.kv_size
    tensors = {"embed": torch.randn(SHAPE.vocab_size, d, generator=generator)}
    tensors["head"] = normal(SHAPE.vocab_size, d)
    for layer in range(SHAPE.num_layers):
        tensors |= {f"{layer}.q": normal(q, d), f"{layer}.k": normal(kv, d)}
        tensors |= {f"{layer}.v": normal(kv, d), f"{layer}.o": normal(d, q)}
        tensors |= {f"{layer}.up": normal(f, d), f"{layer}.down": normal(d, f)}
    return tensors


class ToyPart:
    """One rank's heads and hidden units: q, k, v, up and the head by columns, o and down by rows."""

    def __init__(self, rank: Rank) -> None:
        self.config: ModelConfig = SHAPE.replace(
            num_heads=SHAPE.num_heads // rank.size, num_kv_heads=SHAPE.num_kv_heads // rank.size
        )
        self._rank = rank
        self._caches: Sequence[tuple[Tensor, Tensor]] = ()
        self._cos_sin = identity_table(64, CPU)
        self._weights = {name: self._part(name, tensor) for name, tensor in weights().items()}
        self.num_weights = sum(tensor.numel() for tensor in self._weights.values())

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """Columns of the product are rows of [N, K]."""
        kind = name.partition(".")[2] or name
        if kind == "embed":
            return tensor
        dim = 1 if kind in ("o", "down") else 0
        return tensor.chunk(self._rank.size, dim)[self._rank.rank].contiguous()

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._caches = caches

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        w, shape = self._weights, self.config
        x = w["embed"][inputs.long()]
        for layer, (k_cache, v_cache) in enumerate(self._caches):
            qkv = torch.cat([x @ w[f"{layer}.{name}"].T for name in "qkv"], dim=-1)
            q = reference.qk_norm_rope_store_kv(
                qkv,
                ctx.positions,
                self._cos_sin,
                ctx.slot_mapping,
                k_cache,
                v_cache,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
            )
            attended = reference.paged_attention(
                q,
                k_cache,
                v_cache,
                ctx.block_table,
                ctx.slots,
                ctx.seq_lens,
                ctx.query_start_loc,
                scale=shape.head_dim**-0.5,
                num_decodes=ctx.num_decodes,
                max_query_len=ctx.max_query_len,
                max_seq_len=ctx.max_seq_len,
            )
            x = x + self._rank.reduce(attended @ w[f"{layer}.o"].T)
            up = torch.relu(x @ w[f"{layer}.up"].T)
            x = x + self._rank.reduce(up @ w[f"{layer}.down"].T)
        return x / x.norm(dim=-1, keepdim=True)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._rank.gather(hidden @ self._weights["head"].T, SHAPE.vocab_size) * 8


def load_toy(config: EngineConfig, exchange: Exchange) -> LoadedModel[Any]:
    """The toy model, split over the ranks of an exchange."""
    torch.set_num_threads(1)
    dtypes = ModelDtypes(torch.float32, torch.float32, packed=False, kv_cache=torch.float32)
    parts = [ModelPart(rank.rank, CPU, ToyPart(rank)) for rank in ranks_of(exchange)]
    return LoadedModel(config, SHAPE, dtypes, Mesh(parts, exchange))


def generate_with(
    runner: Callable[[LoadedModel[Any]], Any],
    exchange: Exchange,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Any]:
    """Six requests in steps of at most four and of 16 tokens: chunks, mixed steps, new slots."""
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    monkeypatch.setattr(
        engine_loop, "make_runner", lambda config, source: runner(load_toy(config, exchange))
    )
    llm = LLM(
        str(folder),
        load_format="dummy",
        device="cpu",
        attention_backend="reference",
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        enforce_eager=True,
    )
    rng = np.random.default_rng(5)
    prompts = [{"prompt_token_ids": rng.integers(3, 90, n).tolist()} for n in (3, 9, 20, 1, 30, 6)]
    params = [SamplingParams(**kind, max_tokens=8, ignore_eos=True) for kind in SAMPLING]
    return llm.generate(prompts, params, use_tqdm=False)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Tokens are equal, log probabilities within 1e-4."""
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for rows, others in (
            (one.outputs[0].logprobs, other.outputs[0].logprobs),
            (one.prompt_logprobs, other.prompt_logprobs),
        ):
            assert (rows is None) == (others is None)
            for row, wanted in zip(rows or [], others or [], strict=True):
                assert list(row or ()) == list(wanted or ())
                for token in row or ():
                    assert row[token].logprob == pytest.approx(wanted[token].logprob, abs=1e-4)
