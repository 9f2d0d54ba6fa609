"""Files are read before they are needed, in order, and never too far."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.config import EngineConfig
from octavo.models import loader as loader_module
from octavo.models import read_ahead as read_ahead_module
from octavo.models.read_ahead import ReadAhead
from octavo.models.source import resolve_model
from octavo.models.weights import SafetensorsWeights

BLOCK = 1024


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead_module, "BLOCK_BYTES", BLOCK)


def write(folder: Path, *sizes: int) -> list[Path]:
    files = [folder / f"{i}.bin" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    return files


def settled(ahead: ReadAhead) -> int:
    """How many bytes were read once nothing more is."""
    count = -1
    while count != ahead.num_bytes:
        count = ahead.num_bytes
        time.sleep(0.05)
    return count


def test_reads_everything(tmp_path: Path) -> None:
    files = write(tmp_path, 3 * BLOCK, 0, BLOCK + 1)
    with ReadAhead(files, 100 * BLOCK) as ahead:
        ahead.wait(files[2], BLOCK + 1)
        assert ahead.num_bytes == 4 * BLOCK + 1
        ahead.wait(files[1], 0)


def test_reads_no_further_than_it_may(tmp_path: Path) -> None:
    files = write(tmp_path, 20 * BLOCK, 20 * BLOCK)
    with ReadAhead(files, 4 * BLOCK) as ahead:
        assert settled(ahead) == 4 * BLOCK
        ahead.wait(files[0], 3 * BLOCK)
        assert settled(ahead) == 7 * BLOCK
        # Further than it may read on its own.
        ahead.wait(files[1], BLOCK)
        assert settled(ahead) == 25 * BLOCK
        ahead.wait(files[0], BLOCK)
        assert settled(ahead) == 25 * BLOCK
    # Leaving ends a thread that waits, and whoever waits for it.
    assert not [t for t in threading.enumerate() if t.name == "octavo-read-ahead"]
    ahead.wait(files[1], 20 * BLOCK)
    assert ahead.num_bytes == 25 * BLOCK


def test_a_tensor_is_waited_for_until_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path, 8 * BLOCK)
    may_read = threading.Event()
    may_read_next = ReadAhead._may_read

    def slow(self: ReadAhead, region: Any) -> bool:
        if self.num_bytes == 5 * BLOCK:
            may_read.wait(10)
        return may_read_next(self, region)

    monkeypatch.setattr(ReadAhead, "_may_read", slow)
    with ReadAhead(files, 100 * BLOCK) as ahead:
        ahead.wait(files[0], 5 * BLOCK)
        waiter = threading.Thread(target=lambda: ahead.wait(files[0], 5 * BLOCK + 1))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        may_read.set()
        waiter.join(10)
        assert not waiter.is_alive()


def test_readers_of_regions_leave_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead_module, "REGION_BYTES", 2 * BLOCK)
    files = write(tmp_path, 9 * BLOCK + 7, 1, 6 * BLOCK)
    may_read = threading.Event()
    may_read_next = ReadAhead._may_read

    def stalled(self: ReadAhead, region: Any) -> bool:
        if (region.file, region.offset, region.num_read) == (files[0], 4 * BLOCK, BLOCK):
            may_read.wait(10)
        return may_read_next(self, region)

    monkeypatch.setattr(ReadAhead, "_may_read", stalled)
    with ReadAhead(files, 100 * BLOCK) as ahead:
        # All others are read, but what lies behind the gap is waited for.
        assert settled(ahead) == 14 * BLOCK + 8
        ahead.wait(files[0], 5 * BLOCK)
        waiter = threading.Thread(target=lambda: ahead.wait(files[1], 1))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        may_read.set()
        waiter.join(10)
        assert not waiter.is_alive()
        ahead.wait(files[2], 6 * BLOCK)
        assert ahead.num_bytes == 15 * BLOCK + 8


def test_what_cannot_be_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    files = write(tmp_path, BLOCK, BLOCK)
    ahead = ReadAhead(files, 100 * BLOCK)
    files[0].unlink()
    with ahead:
        ahead.wait(files[1], BLOCK)
        assert ahead.num_bytes == 0


def test_a_gpus_files_are_read_ahead_and_a_cpus_are_not(save_tiny: Any) -> None:
    path, _model = save_tiny("Llama")
    file = path / "model.safetensors"
    source = resolve_model(EngineConfig(model=str(path)))
    with loader_module._read_ahead(source, torch.device("cpu")) as wait:
        assert wait is None
    with loader_module._read_ahead(source, torch.device("cuda")) as wait:
        assert wait is not None
        wait(file, file.stat().st_size)


def test_tensors_are_waited_for(save_tiny: Any) -> None:
    path, _model = save_tiny("Llama")
    file = path / "model.safetensors"
    waits: list[tuple[Path, int]] = []
    weights = SafetensorsWeights(
        [file],
        device=torch.device("cpu"),
        dtype=None,
        act_dtype=torch.float32,
        wait=lambda *asked: waits.append(asked),
    )
    saved = load_file(file)
    for name, tensor in saved.items():
        shape = tuple(tensor.shape)
        if len(shape) == 2:
            assert torch.equal(weights.matrix(name, shape), tensor)
        # Its last bytes are the ones before that offset.
        end = waits[-1][1] if len(shape) == 2 else 0
        raw = tensor.contiguous().view(torch.uint8).flatten()[-64:].numpy().tobytes()
        if end:
            assert file.read_bytes()[end - len(raw) : end] == raw
    assert max(end for _, end in waits) <= file.stat().st_size
