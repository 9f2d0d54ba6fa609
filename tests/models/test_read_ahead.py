"""Files are read before they are needed, in order, and never too far."""

from __future__ import annotations

import itertools
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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file name, offset) of each block read, in the order they were handed out."""
    seen: list[tuple[str, int]] = []
    next_block = ReadAhead._next_block

    def spy(self: ReadAhead) -> int | None:
        block = next_block(self)
        if block is not None:
            file, offset = self._blocks[block]
            seen.append((file.name, offset))
        return block

    monkeypatch.setattr(ReadAhead, "_next_block", spy)
    return seen


def write(folder: Path, *sizes: int) -> list[Path]:
    files = [folder / f"{i}.bin" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    return files


def settled(reads: list[Any]) -> int:
    """How many blocks were read once nothing more is."""
    count = -1
    while count != len(reads):
        count = len(reads)
        time.sleep(0.05)
    return count


def test_every_block_once_in_order(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    files = write(tmp_path, 3 * BLOCK, 0, BLOCK + 1)
    with ReadAhead(files, 100 * BLOCK, num_threads=1):
        settled(reads)
    first = [("0.bin", 0), ("0.bin", BLOCK), ("0.bin", 2 * BLOCK)]
    assert reads == [*first, ("2.bin", 0), ("2.bin", BLOCK)]


def test_many_threads_share_the_blocks(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    files = write(tmp_path, 40 * BLOCK, 9 * BLOCK)
    with ReadAhead(files, 100 * BLOCK):
        settled(reads)
    assert len(reads) == len(set(reads)) == 49


def test_reads_no_further_than_it_may(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    files = write(tmp_path, 20 * BLOCK, 20 * BLOCK)
    with ReadAhead(files, 4 * BLOCK) as ahead:
        assert settled(reads) == 4
        ahead.wait(files[0], 3 * BLOCK)
        assert settled(reads) == 7
        # Further than it may read on its own.
        ahead.wait(files[1], 1)
        assert settled(reads) == 25
        ahead.wait(files[0], BLOCK)
        assert settled(reads) == 25
    # Leaving ends threads that wait.
    assert not [t for t in threading.enumerate() if t.name == "octavo-read-ahead"]
    assert len(reads) == 25


def test_waiting_is_for_everything_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int]]
) -> None:
    """A block that is slow holds those behind it back."""
    files = write(tmp_path, 8 * BLOCK)
    may_read = threading.Event()
    open_file, opened = Path.open, itertools.count()

    def slow_first(self: Path, *args: Any, **kwargs: Any) -> Any:
        if next(opened) == 0:
            may_read.wait()
        return open_file(self, *args, **kwargs)

    ahead = ReadAhead(files, 100 * BLOCK)
    monkeypatch.setattr(Path, "open", slow_first)
    waited = threading.Thread(target=lambda: ahead.wait(files[0], 8 * BLOCK))
    with ahead:
        waited.start()
        assert settled(reads) == 8
        waited.join(0.2)
        assert waited.is_alive()
        may_read.set()
        waited.join(10)
        assert not waited.is_alive()


def test_what_cannot_be_read_is_left_alone(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    files = write(tmp_path, BLOCK, BLOCK)
    ahead = ReadAhead(files, 100 * BLOCK)
    files[0].unlink()
    with ahead:
        ahead.wait(files[1], BLOCK)
    assert reads == [("0.bin", 0), ("1.bin", 0)]


def test_a_gpus_files_are_read_ahead_and_a_cpus_are_not(
    save_tiny: Any, reads: list[tuple[str, int]]
) -> None:
    path, _model = save_tiny("Llama")
    source = resolve_model(EngineConfig(model=str(path)))
    with loader_module._read_ahead(source, torch.device("cpu")) as wait:
        assert wait is None
    with loader_module._read_ahead(source, torch.device("cuda")) as wait:
        assert wait is not None
        wait(path / "model.safetensors", 1)
        settled(reads)
    assert len(reads) == -(-(path / "model.safetensors").stat().st_size // BLOCK)


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
