"""EagerRunner: sizes, limits and staging, around a model of random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import resolve_model
from octavo.runner.eager import EagerRunner
from octavo.runner.input_batch import InputBatch
from octavo.runner.loading import load
from octavo.runner.request_state import RequestState, encode_bad_words
from octavo.sampling_params import SamplingParams

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing but a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def runner(folder: Path, **config: Any) -> EagerRunner:
    engine = EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        attention_backend="reference",
        threads=1,
        **config,
    )
    return EagerRunner(load(engine, resolve_model(engine)))


def test_defaults_of_a_cpu(folder: Path) -> None:
    made = runner(folder)
    assert (made.max_num_seqs, made.max_num_batched_tokens, made.block_size) == (64, 2048, 16)
    assert made.max_model_len == 256
    assert made.max_in_flight == 1
    # 64 requests of 256 tokens need less than the default gigabyte.
    assert made.num_blocks == 64 * 16
    assert len(made.mesh.lead.kv_caches) == 2
    table = dict(made.memory())
    assert table["KV blocks"] == "1,024 of 16 tokens"
    assert "float32" in table["KV cache"]
    assert torch.get_num_threads() == 1


def test_what_the_user_says_is_kept(folder: Path) -> None:
    made = runner(
        folder,
        max_num_seqs=3,
        max_num_batched_tokens=40,
        block_size=8,
        max_model_len=100,
        kv_cache_dtype="bfloat16",
    )
    assert (made.max_num_seqs, made.max_num_batched_tokens, made.block_size) == (3, 40, 8)
    assert (made.max_model_len, made.num_blocks) == (100, 3 * 13)
    assert made.mesh.lead.kv_caches[0][0].dtype == torch.bfloat16
    assert made.mesh.lead.batch.block_table.shape == (4, 13)


def test_limits_that_cannot_be_met_are_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="max_model_len 300 is beyond the model's own 256"):
        runner(folder, max_model_len=300)
    with pytest.raises(ModelLoadError, match="max_num_batched_tokens 100 must be at least"):
        runner(folder, enable_chunked_prefill=False, max_num_batched_tokens=100)
    with pytest.raises(ModelLoadError, match="raise kv_cache_memory_bytes"):
        runner(folder, kv_cache_memory_bytes=20_000)
    # 2 x 2 layers x 16 x 4 bytes a token: 256.
    assert runner(folder, kv_cache_memory_bytes=20_000, max_model_len=-1).max_model_len == 64


def test_dynamic_rope_reaches_further_only_when_asked(folder: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": scaling}))
    assert runner(folder).max_model_len == 256
    assert runner(folder, max_model_len=500).max_model_len == 500
    with pytest.raises(ModelLoadError, match="beyond the model's own 512"):
        runner(folder, max_model_len=513)


def test_without_a_gpu_cuda_is_refused(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    engine = EngineConfig(model=str(folder), load_format="dummy", device="cuda")
    with pytest.raises(ModelLoadError, match="device cuda"):
        EagerRunner(load(engine, resolve_model(engine)))


def test_warm_up_stores_nothing(folder: Path) -> None:
    made = runner(folder)
    for k_cache, v_cache in made.mesh.lead.kv_caches:
        k_cache.fill_(7.0)
        v_cache.fill_(7.0)
    made.warm_up()
    assert all(bool((cache == 7.0).all()) for pair in made.mesh.lead.kv_caches for cache in pair)


def test_only_a_broken_device_is_fatal(folder: Path) -> None:
    made = runner(folder)
    assert not made.is_fatal(RuntimeError("one step"))
    assert not made.is_fatal(MemoryError())


def test_an_input_batch_is_views_of_the_packed_buffer() -> None:
    sections: dict[str, list[int]] = {
        "input_ids": [5, 6, 7],
        "positions": [9, 0, 1],
        "slot_mapping": [41, 64, 65],
        "slots": [2, 0],
        "seq_lens": [10, 2],
        "query_start_loc": [0, 1, 3],
        "sample_rows": [0, 2],
        "sample_slots": [2, 0],
        "block_updates": [0, 2 * 4 + 1, 16, 5],
    }
    packed = torch.tensor([v for values in sections.values() for v in values], dtype=torch.int32)
    batch: Any = SimpleNamespace(
        num_tokens=3,
        num_reqs=2,
        num_decodes=1,
        num_block_updates=2,
        state_restores_offset=len(packed),
        max_query_len=2,
        max_seq_len=10,
    )
    inputs = InputBatch(3, 4, torch.device("cpu"))
    inputs.load(batch, packed)
    context = inputs.context
    for name in ("positions", "slot_mapping", "slots", "seq_lens", "query_start_loc"):
        assert getattr(context, name).tolist() == sections[name]
    assert inputs.input_ids.tolist() == [5, 6, 7]
    assert inputs.sample_rows.tolist() == [0, 2]
    assert inputs.sample_slots.tolist() == [2, 0]
    expected = np.zeros((4, 4), np.int32)
    expected[0, 0], expected[2, 1] = 16, 5
    assert np.array_equal(context.block_table.numpy(), expected)
    assert (context.num_decodes, context.max_query_len, context.max_seq_len) == (1, 2, 10)


def test_bad_words_are_spelt_with_and_without_a_space() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [ord(c) for c in text]

    letters: Any = Letters()
    assert encode_bad_words(letters, ["ab", " c"]) == (
        (97, 98),
        (32, 97, 98),
        (32, 99),
    )
    assert encode_bad_words(letters, []) == ()


def test_a_request_tells_whether_it_has_penalties() -> None:
    def has(**params: Any) -> bool:
        state = RequestState(
            request_id=0,
            params=SamplingParams(**params),
            prompt_token_ids=[1],
            max_tokens=1,
            arrival_s=0.0,
        )
        return state.has_penalties

    assert not has(temperature=0.3)
    assert has(repetition_penalty=0.9)
    assert has(presence_penalty=0.1)
    assert has(frequency_penalty=-0.1)
