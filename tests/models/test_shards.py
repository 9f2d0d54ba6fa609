"""Models split over several shards of one CPU against transformers, and against one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt, prove_greedy
from test_families import CASES

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.rank import ALONE
from octavo.kernels.weights import quantize
from octavo.llm import LLM
from octavo.models.config import ModelConfig
from octavo.models.parts import check_split, heads_of, width_of
from octavo.models.source import resolve_model
from octavo.runner.loading import shard_devices
from octavo.sampling_params import SamplingParams


def sizes(shape: ModelConfig) -> list[int]:
    """Numbers of shards, up to four, that the model can be split over."""
    found = []
    for size in (2, 3, 4):
        try:
            check_split(shape, size)
        except ModelLoadError:
            continue
        found.append(size)
    return found


def mesh(size: int) -> str:
    return ",".join(["cpu"] * size)


def cases() -> Iterator[Any]:
    """A case of each family, and every other one in the long list."""
    seen: set[str] = set()
    for name, (family, _) in CASES.items():
        marks = [pytest.mark.slow] if family in seen else []
        seen.add(family)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", cases())
def test_a_split_family_is_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    fits = sizes(shape)
    if not fits:
        assert shape.num_heads == 1
        return
    token_ids = make_prompt(77)
    want = logits_of(model, token_ids)
    for size in fits:
        found = driver(path, mesh=mesh(size)).logits(token_ids)
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    copies = max(fits[-1] // shape.num_kv_heads, 1)
    prove_greedy(driver, path, model, mesh=mesh(fits[-1]), kv_copies=copies)


def generate(path: Path, prompts: list[list[int]], **config: Any) -> list[Any]:
    llm = LLM(str(path), device="cpu", max_num_seqs=4, max_num_batched_tokens=32, **config)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=24, logprobs=2),
        SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=24),
        SamplingParams(temperature=0.0, max_tokens=24, repetition_penalty=1.2, n=2),
    ]
    params = [kinds[i % len(kinds)] for i in range(len(inputs))]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("quantization", ["w4", "w8"])
def test_shards_of_a_quantized_model_choose_the_tokens_of_one(
    quantization: str, save_tiny: Callable[..., Any]
) -> None:
    path, _ = save_tiny(
        "Llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=32
    )
    prompts = [make_prompt(n, seed=n) for n in (3, 50, 17, 1, 40, 9)]
    options = {"dtype": "float32", "quantization": quantization}
    want = generate(path, prompts, **options)
    for size in (2, 4):
        assert generate(path, prompts, mesh=mesh(size), **options) == want


def test_a_cut_through_a_block_is_refused_with_the_numbers(save_tiny: Callable[..., Any]) -> None:
    """A rank's 24 columns of the output projection, of a weight whose blocks have 32."""
    path, _ = save_tiny("Llama", hidden_size=96, num_attention_heads=4, head_dim=24)
    quantized = {"mesh": "cpu,cpu,cpu,cpu", "quantization": "w4", "dtype": "float32"}
    tokens = generate(path, [make_prompt(5)], **quantized)
    # Rounding comes after the cut there: parts that are no whole blocks stay as they are.
    assert len(tokens[0][0]) == 24
    planes = quantize(torch.randn(96, 96), "Q4_1")
    assert planes.shape == (96, 96)


def shape(num_heads: int, num_kv_heads: int) -> ModelConfig:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 8 * num_heads,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 64,
    }
    from octavo.models.registry import config_from_hf

    return config_from_hf(config)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "fits"),
    [(9, 3, 2, "1, 3, 9"), (32, 8, 3, "1, 2, 4, 8, 16, 32"), (6, 4, 4, "1, 2")],
)
def test_heads_that_do_not_divide_are_refused_with_what_would(
    num_heads: int, num_kv_heads: int, size: int, fits: str
) -> None:
    with pytest.raises(ModelLoadError) as error:
        check_split(shape(num_heads, num_kv_heads), size)
    assert str(error.value) == (
        f"tensor_parallel_size {size}: {num_heads} heads and {num_kv_heads} key-value heads do not "
        f"divide by it; these would: {fits}"
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(8, 4, 2), (8, 2, 4), (8, 1, 8)])
def test_every_query_head_is_beside_its_key_value_head(
    num_heads: int, num_kv_heads: int, size: int
) -> None:
    group = num_heads // num_kv_heads
    seen: list[int] = []
    for rank in range(size):
        heads = heads_of(shape(num_heads, num_kv_heads), ALONE.at(rank, size))
        seen += range(*heads.q)
        own = {q // group for q in range(*heads.q)}
        assert own == set(range(*heads.kv))
    assert seen == list(range(num_heads))


@pytest.mark.parametrize(("size", "count"), [(5632, 4), (96, 3), (100, 3), (768, 2), (24, 4)])
def test_widths_are_the_whole_and_between_the_same_blocks(size: int, count: int) -> None:
    ranges = [width_of(size, ALONE.at(rank, count)) for rank in range(count)]
    assert [ranges[0][0], ranges[-1][1]] == [0, size]
    assert all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False))
    assert all(end > begin for begin, end in ranges)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, r"a CPU is one device.*--mesh cpu,cpu"),
        ({"mesh": "cpu,cpu", "tensor_parallel_size": 3}, r"has 2 devices, .* is 3"),
        ({"mesh": "cpu,nowhere"}, "mesh 'cpu,nowhere'"),
        ({"mesh": "cpu,meta"}, "on a CPU only"),
    ],
)
def test_devices_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        shard_devices(EngineConfig(model="m", device="cpu", **settings))
