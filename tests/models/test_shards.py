"""Models split over several shards of one CPU against transformers, and against one shard."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import ATTENTION_CASES
from fidelity import logits_of, make_prompt, prove_greedy, tiny_config
from safetensors.torch import load_file, save_file
from test_families import CASES

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.rank import ALONE
from octavo.kernels.weights import Columns, part_of, quantize
from octavo.llm import LLM
from octavo.models.config import ModelConfig
from octavo.models.parts import heads_of, width_of
from octavo.models.registry import config_from_hf
from octavo.models.source import resolve_model
from octavo.models.split import check_split
from octavo.models.stage import stages_of
from octavo.runner.devices import shard_devices
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
    """A case of each family, one more in the long list, every other one in the longest.

    Of families that came later, a case of each way to split what the others have not.
    """
    seen = {family for family, _ in ATTENTION_CASES.values()} - {"GptOss", "Glm4Moe", "MiniMaxM2"}
    seen_slowly: set[str] = set()
    for name, (family, _) in CASES.items():
        marks = [pytest.mark.slow] if family in seen else []
        if family in seen_slowly:
            marks.append(pytest.mark.nightly)
        if marks:
            seen_slowly.add(family)
        seen.add(family)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(cases()))
def test_a_split_family_computes_what_transformers_does(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    token_ids = make_prompt(77)
    want = logits_of(model, token_ids)
    for size in sizes(resolve_model(EngineConfig(model=str(path))).model_config):
        found = driver(path, mesh=mesh(size)).logits(token_ids)
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(cases()))
def test_a_split_family_serves_what_transformers_computes(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    for size in sizes(shape)[-1:]:
        copies = max(size // shape.num_kv_heads, 1)
        prove_greedy(driver, path, model, mesh=mesh(size), kv_copies=copies)


def test_the_fused_tensors_of_experts_are_split(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    path, model = save_tiny("Qwen3Moe", num_hidden_layers=2, **experts)
    model.save_pretrained(path, save_original_format=False)
    token_ids = make_prompt(77)
    found = driver(path, mesh=mesh(2)).logits(token_ids)
    torch.testing.assert_close(found, logits_of(model, token_ids), atol=1e-4, rtol=1e-4)


def test_all_models_but_those_of_one_head_are_split() -> None:
    """So that no family passes the tests above by not being in them."""
    for family, config in CASES.values():
        kept = tiny_config(family, **{"num_hidden_layers": 2, **config})
        architecture = f"{family.removesuffix('Text')}ForCausalLM"
        shape = config_from_hf({**kept.to_dict(), "architectures": [architecture]})
        assert bool(sizes(shape)) == (shape.num_heads > 1)


@pytest.mark.parametrize("quantization", ["w4", "w8"])
def test_shards_of_a_quantized_model_choose_the_tokens_of_one(
    quantization: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny(
        "Llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=32
    )
    prompts = [make_prompt(n, seed=n) for n in (3, 50, 17, 1, 40, 9)]

    def tokens(**config: Any) -> list[list[list[int]]]:
        engine = driver(path, dtype="float32", quantization=quantization, **config)
        kinds = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9})
        params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in kinds]
        return [[one.token_ids for one in engine.generate(prompts, p)] for p in params]

    want = tokens()
    assert all(tokens(mesh=mesh(size)) == want for size in (2, 4))


@pytest.mark.slow
def test_three_shards_of_smollm2_choose_the_tokens_of_one(smollm2_path: Path) -> None:
    """Nine heads, three key-value heads, blocks of 32: over ten prompts."""
    texts = ["The capital of France is", "Once upon a time", "def fib(n):", "1, 2, 3,", "Dear Sir"]
    texts += ["The sky is", "import os", "Hello", "A B C", "In 1969"]
    params = SamplingParams(max_tokens=24, temperature=0.0)

    def tokens(**config: Any) -> list[list[int]]:
        llm = LLM(str(smollm2_path), device="cpu", dtype="float32", max_model_len=512, **config)
        outputs = llm.generate(texts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert tokens(mesh="cpu,cpu,cpu") == tokens()


def test_a_cut_through_a_block_is_refused_with_the_numbers(tmp_path: Path) -> None:
    planes = quantize(torch.randn(96, 96), "Q4_1")
    with pytest.raises(ValueError, match=r"columns 0 to 24 of 96 cut a block of 32 .*: 1, 3$"):
        part_of(planes, Columns(0, 24))


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("size", [1, 2])
def test_a_pipeline_serves_what_transformers_computes(
    name: str, size: int, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    """Two stages, of one shard each and of two."""
    family, config = CASES[name]
    path, model = save_tiny(family, **{"num_hidden_layers": 2, **config})
    shape = resolve_model(EngineConfig(model=str(path))).model_config
    if size > 1 and size not in sizes(shape):
        size = (sizes(shape) or [1])[0]
    copies = max(size // shape.num_kv_heads, 1)
    options = {"mesh": mesh(2 * size), "pipeline_parallel_size": 2}
    prove_greedy(driver, path, model, kv_copies=copies, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stages_are_all_layers_and_their_largest_is_least(count: int) -> None:
    config = shape(4, 2).replace(num_layers=7, vocab_size=4000)
    stages = stages_of(config, count)
    assert [layer for stage in stages for layer in stage.layers] == list(range(7))
    assert [stage.index for stage in stages] == list(range(count))
    # The table of 4,000 rows is more than all layers: the ends have as few as they can.
    if count > 2:
        assert len(stages[0].layers) == len(stages[-1].layers) == 1
    with pytest.raises(ModelLoadError, match="pipeline_parallel_size 8: the model has 7 layers"):
        stages_of(config, 8)


def test_a_tensor_that_no_stage_reads_is_refused(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Llama")
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelLoadError, match=r"layers\.0\.extra\.weight is not part of this model"):
        driver(path, mesh="cpu,cpu", pipeline_parallel_size=2)


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
    return config_from_hf(config)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "fits"),
    [(9, 3, 2, "1, 3, 9"), (32, 8, 3, "1, 2, 4, 8, 16, 32"), (12, 4, 6, "1, 2, 4, 12")],
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
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert all(end > begin for begin, end in ranges)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, r"2 x 1 shards: a CPU is one device.*--mesh cpu,cpu"),
        ({"mesh": "cpu,cpu", "tensor_parallel_size": 3}, "has 2 devices for 3 x 1 shards"),
        ({"mesh": "cpu,cpu,cpu", "pipeline_parallel_size": 2}, "has 3 devices for 1 x 2 shards"),
        ({"mesh": "cpu,nowhere"}, "mesh 'cpu,nowhere'"),
        ({"mesh": "cpu,meta"}, "must be of one kind"),
    ],
)
def test_devices_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        shard_devices(EngineConfig(model="m", device="cpu", **settings))


def test_fewer_gpus_than_shards_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with pytest.raises(ModelLoadError, match="2 x 2 shards: this machine has 3 GPUs, and tensor_"):
        shard_devices(EngineConfig(model="m", **sizes))
    with pytest.raises(ModelLoadError, match="'cuda:0,cuda:3': this machine has 3 GPUs"):
        shard_devices(EngineConfig(model="m", mesh="cuda:0,cuda:3"))
    assert len(shard_devices(EngineConfig(model="m", tensor_parallel_size=3))) == 3
