"""Transformers' logits in float64, and its greedy tokens on a rough ride, asked of every model."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from octavo.config import EngineConfig
from octavo.models.source import resolve_model
from octavo.runner.kv_cache import bytes_per_token


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special to ``save_tiny``."""
    return random.Random(seed).choices(range(3, 300), k=length)


def tiny_config(family: str, **config: Any) -> Any:
    """A transformers config of a class, ``tiny_config("Llama", num_hidden_layers=2)``."""
    import transformers

    defaults: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        # Families' own are beyond so small a vocabulary.
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Large enough that the best token leads by more than float32's noise, small enough
        # that logits stay near one and that noise far below 1e-4.
        "initializer_range": 1.8 / config.get("hidden_size", 64) ** 0.5,
    }
    return getattr(transformers, f"{family}Config")(**defaults | config)


class Float64(TorchFunctionMode):
    """Computes in float64 wherever a model's code asks for float32, as norms and softmax do."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.is_on:
            return function(*args, **kwargs)
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        wide = {torch.float32: torch.float64}
        args = tuple(wide[a] if a is torch.float32 else a for a in args)
        kwargs = {name: wide[a] if a is torch.float32 else a for name, a in kwargs.items()}
        return function(*args, **kwargs)


@functools.lru_cache(maxsize=1)
def _in_float64(model: torch.nn.Module) -> tuple[torch.nn.Module, Float64]:
    """A copy of a model, and the mode to call it in.

    Cosines and sines stay float32: they are part of what the model was trained as, like its
    weights, and at far positions float64's are others.
    """
    mode = Float64()

    def switch(is_on: bool) -> Callable[..., None]:
        return lambda *_: setattr(mode, "is_on", is_on)

    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the others' products have no float64
    for module in exact.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_pre_hook(switch(False))
            module.register_forward_hook(switch(True))
    return exact, mode


def logits_of(model: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """float32 [T, V]: what transformers computes in float64, rounded once.

    In float32 it is as far from that as octavo may be, and the two errors would add up.
    """
    exact, mode = _in_float64(model)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), mode:
            logits: torch.Tensor = exact(input_ids=torch.tensor([list(token_ids)])).logits[0]
    finally:
        torch.set_default_dtype(default)
    assert logits.dtype is torch.float64
    return logits.to(torch.float32)


def assert_greedy(model: Any, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
    """That transformers, given the same beginning, picks each of these tokens itself."""
    assert len(output_ids) == 64
    logits = logits_of(model, [*prompt_ids, *output_ids])[len(prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
    lost = logits.amax(1) - chosen
    # A tie in float32 may fall either way; anything else is a fault.
    assert float(lost.max()) < 1e-4, f"token {int(lost.argmax())}: {float(lost.max())} lost"


def prove_greedy(
    driver: Callable[..., Any], path: Path, model: Any, *, kv_copies: float = 1, **config: Any
) -> None:
    """One engine whose cache is too small and whose steps are short: prompts come in chunks, share
    prefixes, run in batches of mixed lengths, and are preempted; 64 tokens each are transformers'.

    ``kv_copies``: ranks that hold the same key-value head, a mean where layers differ.
    """
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    engine = driver(
        path,
        max_num_batched_tokens=32,
        max_num_seqs=5,
        max_model_len=200,
        # 20 blocks of 16 tokens, for three prompts and answers of some 100 to 160.
        kv_cache_memory_bytes=int(20 * 16 * bytes_per_token(shape, torch.float32) * kv_copies),
        **config,
    )
    shared = make_prompt(48, seed=1)
    prompts = [shared + make_prompt(43, seed=2), make_prompt(1, seed=3), make_prompt(33, seed=4)]
    outputs = engine.generate(prompts)
    assert any(0 < decodes < reqs for decodes, reqs in engine.batch_sizes)
    prompts.append(shared + make_prompt(20, seed=5))
    outputs += engine.generate(prompts[3:])
    assert outputs[3].num_cached_tokens == 48
    prompts += [make_prompt(90, seed) for seed in (6, 7, 8)]
    outputs += engine.generate(prompts[4:])
    assert engine.core.stats()["num_preemptions"] > 0
    assert len({token for output in outputs for token in output.token_ids}) > 5
    for prompt_ids, output in zip(prompts, outputs, strict=True):
        assert_greedy(model, prompt_ids, output.token_ids)
