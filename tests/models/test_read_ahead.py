"""Tensors are read before they are asked for, in order, whole, and never too far.

Without a GPU they are copied to the CPU's memory; threads, blocks and regions are the same.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.checkpoints import read_ahead as read_ahead_module
from octavo.checkpoints.read_ahead import ReadAhead
from octavo.checkpoints.safetensors import SafetensorsWeights, read_entries
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Columns, Rows
from octavo.layers.ops import get_ops
from octavo.models.source import resolve_model
from octavo.models.stage import Stage
from octavo.runner import loading
from octavo.runner.dtypes import resolve_dtypes

CPU, META = torch.device("cpu"), torch.device("meta")
BLOCK = 1024


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(read_ahead_module, "REGION_BYTES", 4 * BLOCK)


def write(folder: Path, *files: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"{i}.safetensors" for i in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file(tensors, path)
    return paths


def rows(num_blocks: int) -> Tensor:
    return torch.randn(num_blocks, BLOCK // 4)


def settled(ahead: ReadAhead) -> int:
    """How many bytes were read once nothing more is."""
    count = -1
    while count != ahead.num_bytes:
        count = ahead.num_bytes
        time.sleep(0.05)
    return count


@pytest.mark.parametrize("max_ahead", [0, 5 * BLOCK, None])
@pytest.mark.parametrize("region_blocks", [1, 3, 1000])
def test_tensors_are_what_they_are_in_their_files(
    tmp_path: Path, region_blocks: int, max_ahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead_module, "REGION_BYTES", region_blocks * BLOCK)
    saved = [
        {
            "a": torch.randn(3, 701).bfloat16(),
            "b": torch.randn(1),
            "c": torch.randn(7, 0, 2),
            "d": torch.tensor(2.5),
            "e": torch.randn(4001).half(),
            "f": torch.arange(5000, dtype=torch.int32),
            "g": torch.randn(90, 11),
        },
        {},
        {"a": torch.randn(2, 2)},
    ]
    files = write(tmp_path, *saved)
    with ReadAhead(files, CPU, max_ahead) as ahead:
        for file, tensors in reversed(list(zip(files, saved, strict=True))):
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    taken = ahead.take(file, name)
                    assert (taken.dtype, taken.shape) == (tensor.dtype, tensor.shape)
                    assert torch.equal(taken, tensor)


def test_reads_no_further_than_it_may(tmp_path: Path) -> None:
    names = [f"{i:02}" for i in range(20)]
    files = write(tmp_path, *({name: rows(1) for name in names} for _ in range(2)))
    header = read_entries(files[0])[0].begin  # counts as ahead, and is not read
    assert header < 2 * BLOCK
    with ReadAhead(files, CPU, max_ahead=8 * BLOCK) as ahead:
        first = settled(ahead)
        assert 6 * BLOCK < first <= 8 * BLOCK
        ahead.take(files[0], names[5])
        assert 6 * BLOCK <= settled(ahead) - first <= 8 * BLOCK
        # Further than it may read on its own; what lies before it is read as well.
        ahead.take(files[1], names[9])
        far = settled(ahead)
        assert 38 * BLOCK - header <= far <= 40 * BLOCK
        ahead.take(files[0], names[0])
        assert settled(ahead) == far
    # Leaving ends threads that wait.
    assert not [t for t in threading.enumerate() if t.name == "octavo-read-ahead"]
    assert ahead.num_bytes == far


def test_a_tensor_is_waited_for_until_all_of_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": rows(2), "b": rows(30), "c": rows(2)}
    [file] = write(tmp_path, tensors)
    gap = read_entries(file)[0].begin + 16 * BLOCK  # where a block of b begins
    may_read, may_read_next = threading.Event(), ReadAhead._may_read

    def stalled(self: ReadAhead, at: int) -> bool:
        if at == gap:
            may_read.wait(10)
        return may_read_next(self, at)

    monkeypatch.setattr(ReadAhead, "_may_read", stalled)
    with ReadAhead([file], CPU) as ahead:
        settled(ahead)
        # What lies before and behind the gap is there.
        for name in ("a", "c"):
            assert torch.equal(ahead.take(file, name), tensors[name])
        taken: list[Tensor] = []
        waiter = threading.Thread(target=lambda: taken.append(ahead.take(file, "b")))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        may_read.set()
        waiter.join(10)
    assert torch.equal(taken[0], tensors["b"])


def test_a_file_that_becomes_shorter_is_named_with_its_tensor(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": rows(3)}, {"b": rows(2), "c": rows(20), "d": rows(2)})
    ahead = ReadAhead(files, CPU)
    with files[1].open("r+b") as stream:
        stream.truncate(9 * BLOCK)
    with ahead:
        with pytest.raises(ModelLoadError) as error:
            ahead.take(files[1], "d")
        assert str(error.value) == f"{files[1]}: tensor c: the file has become shorter"


def test_a_file_that_is_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": rows(1)}, {"b": rows(1)})
    ahead = ReadAhead(files, CPU)
    files[0].unlink()
    with ahead, pytest.raises(ModelLoadError, match=r"0\.safetensors: tensor a: .*No such file"):
        ahead.take(files[0], "a")


@pytest.mark.parametrize(
    ("free", "expected"), [(80 << 30, 2 << 30), (17 << 30, 1 << 29), (15 << 30, 0)]
)
def test_what_waits_on_the_device_leaves_room_for_the_weights(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    assert read_ahead_module._room(torch.device("cuda"), 16 << 30) == expected


def test_a_device_without_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [file] = write(tmp_path, {"a": rows(1)})

    def no_room(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ReadAhead, "_place", no_room)
    with ReadAhead([file], CPU) as ahead, pytest.raises(torch.OutOfMemoryError, match="no room"):
        ahead.take(file, "a")


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    [file] = write(tmp_path, {"a": rows(1)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        ReadAhead([file], CPU)


def test_a_gpus_files_are_read_ahead_and_a_cpus_are_not(
    save_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(EngineConfig(model=str(save_tiny("Llama")[0])))
    monkeypatch.setattr(
        loading, "ReadAhead", lambda files, device, **kept: ReadAhead(files, device and CPU, **kept)
    )
    with loading._read_ahead(source, CPU) as take:
        assert take is None
    with loading._read_ahead(source, torch.device("cuda")) as take:
        assert take is not None


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_a_model_is_the_same_however_it_is_read(
    save_tiny: Any, max_shard_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny("Llama", max_shard_size=max_shard_size)[0]
    config = EngineConfig(model=str(path), attention_backend="reference")
    source = resolve_model(config)
    read_ahead = loading._read_ahead

    def load() -> Any:
        dtypes = resolve_dtypes(config, source.model_config, source, CPU)
        ops = get_ops(CPU, "reference")
        return loading.load_model(source, dtypes, ops, max_model_len=64, device=CPU)

    def numbers(layer: Any) -> Tensor:
        found: Tensor = layer.weight.dequantize()
        return found

    first = load()
    monkeypatch.setattr(
        loading, "ReadAhead", lambda files, device, **kept: ReadAhead(files, device and CPU, **kept)
    )
    monkeypatch.setattr(
        loading,
        "_read_ahead",
        lambda given, _, *part, **kept: read_ahead(given, torch.device("cuda"), *part, **kept),
    )
    second = load()
    assert torch.equal(numbers(first.embed_tokens), numbers(second.embed_tokens))
    for layer in range(len(first.layers)):
        old, new = first.layers[layer], second.layers[layer]
        assert torch.equal(numbers(old.self_attn.qkv_proj), numbers(new.self_attn.qkv_proj))
        assert torch.equal(numbers(old.mlp.down_proj), numbers(new.mlp.down_proj))


def test_what_no_one_wants_is_not_read(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.experts.{layer % 2}.w" for layer in range(12)]
    [file] = write(tmp_path, {name: rows(8) for name in names} | {"model.norm.weight": rows(1)})
    tensors = load_file(file)
    stage = Stage(1, 2, range(6, 12))
    with ReadAhead([file], CPU, is_wanted=stage.reads) as ahead:
        for name in (*names[6:], "model.norm.weight"):
            assert torch.equal(ahead.take(file, name), tensors[name])
        assert settled(ahead) < 0.75 * file.stat().st_size
        assert not ahead._by_name


@pytest.mark.parametrize("mesh", [{}, {"pipeline_parallel_size": 2}])
def test_parts_are_loaded_at_once_and_are_those_of_one_after_the_other(
    mesh: dict[str, Any], save_tiny: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one device are two devices to the loader."""
    path = save_tiny("Llama")[0]
    want = driver(path, mesh="cpu,cpu", **mesh).generate([[5, 6, 7]])[0].token_ids
    build, both = loading.load_model, threading.Barrier(2, timeout=20)
    read_ahead = loading._read_ahead

    def meet(*args: Any, **options: Any) -> Any:
        both.wait()
        # The files' own reader knows one name alone.
        return build(*args, **{**options, "device": CPU})

    monkeypatch.setattr(loading, "load_model", meet)
    monkeypatch.setattr(
        loading, "ReadAhead", lambda files, device, **kept: ReadAhead(files, device and CPU, **kept)
    )
    monkeypatch.setattr(
        loading,
        "_read_ahead",
        lambda given, _, *part, **kept: read_ahead(given, torch.device("cuda"), *part, **kept),
    )
    found = driver(path, mesh="cpu,cpu:0", **mesh).generate([[5, 6, 7]])[0].token_ids
    assert found == want


class Copies(TorchDispatchMode):
    """Sizes of what is copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == META:
            self.sizes.append(list(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_what_several_devices_share_is_read_once_and_cut_before_it_is_copied(
    tmp_path: Path,
) -> None:
    tensors = {"a.weight": rows(40), "e.b": torch.randn(5, 6, 8), "c.weight": rows(40)}
    [file] = write(tmp_path, tensors)
    with ReadAhead([file], None, max_ahead=16 * BLOCK) as ahead, Copies() as copies:
        assert 14 * BLOCK < settled(ahead) <= 16 * BLOCK
        for shard in range(2):
            weights = SafetensorsWeights(
                [file], device=META, dtype=None, act_dtype=torch.float32, take=ahead.take
            )
            own = Rows(((20 * shard, 20 * shard + 20),))
            assert weights.linear("a", (40, BLOCK // 4), own).device == META
            for expert in weights.experts("e", 5, "b", (8, 6), Columns(2, 4), (3, 5)):
                assert expert.shape == (8, 2)
            weights.linear("c", (40, BLOCK // 4), Columns(64 * shard, 64 * shard + 64))
        assert ahead.num_bytes <= file.stat().st_size
    assert copies.sizes == 2 * [[20, BLOCK // 4], [2, 2, 8], [40, 64]]
    with ReadAhead([file], None) as ahead:
        mapped = SafetensorsWeights(
            [file], device=CPU, dtype=None, act_dtype=torch.float32, take=ahead.take
        )
        found = mapped.linear("c", (40, BLOCK // 4), Columns(3, 30))
        assert torch.equal(found, tensors["c.weight"][:, 3:30])


def test_tensors_are_taken_from_whoever_reads_them(save_tiny: Any) -> None:
    file = save_tiny("Llama")[0] / "model.safetensors"
    asked: list[tuple[Path, str]] = []
    saved = load_file(file)

    def take(*which: Any) -> Tensor:
        asked.append(which)
        return saved[which[1]]

    weights = SafetensorsWeights([file], device=CPU, dtype=None, act_dtype=torch.float32, take=take)
    name, tensor = next((name, tensor) for name, tensor in saved.items() if tensor.ndim == 2)
    rows, columns = tensor.shape
    prefix = name.removesuffix(".weight")
    assert weights.linear(prefix, (rows, columns)) is tensor
    with pytest.raises(ModelLoadError, match="the config says"):
        weights.linear(prefix, (rows, columns + 1))
    assert asked == [(file, name)]
