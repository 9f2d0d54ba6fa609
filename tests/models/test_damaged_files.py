"""Checkpoint headers with random damage: an error or a file within its bounds, never a crash."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.models.errors import ModelLoadError
from octavo.models.weights import SafetensorsWeights

NUM_CASES = 3000
# In a process of its own, whose memory is limited: a size believed from the file would end it.
GGUF_CASES = """
import random, resource, sys
from pathlib import Path
from octavo._core import GgufFile
whole, file = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
random.seed(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
EXTREMES = [b"\\xff" * 8, b"\\xff" * 4, b"\\x00" * 8, (1 << 62).to_bytes(8, "little"), b"\\x80"]
refused = 0
for case in range(int(sys.argv[3])):
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(4, len(data) - 8)
        new = random.choice(EXTREMES) if random.random() < 0.6 else random.randbytes(1)
        data[at : at + len(new)] = new
    if random.random() < 0.2:
        del data[random.randrange(len(data)) :]
    file.write_bytes(data)
    try:
        found = GgufFile(str(file))
        found.metadata()
        for name, (_shape, _kind, offset, nbytes) in found.tensors().items():
            assert offset + nbytes <= len(data), (case, name)
            assert found.data(name).nbytes == nbytes
    except ValueError as error:
        assert "\\n" not in str(error), case
        refused += 1
print(refused)
"""


def test_gguf_headers(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(str(whole), "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arguments = [str(whole), str(tmp_path / "damaged.gguf"), str(NUM_CASES)]
    done = subprocess.run(
        [sys.executable, "-c", GGUF_CASES, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Damage to a tensor's values is nobody's to see; most of this file is its header.
    assert int(done.stdout) > NUM_CASES // 5


def test_safetensors_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(3, 32), "b.weight": torch.ones(32, 3)}, file)
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(1)
    refusals = []
    for _ in range(NUM_CASES):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 4))):
            data[chance.randrange(header)] = chance.choice((0, 34, 44, 57, 93, 125, 255))
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            weights = SafetensorsWeights(
                [file],
                device=torch.device("cpu"),
                dtype=torch.float32,
                act_dtype=torch.float32,
            )
            for name, shape in (("a.weight", (3, 32)), ("b.weight", (32, 3))):
                found = weights.matrix(name, shape)
                assert tuple(found.shape) == shape
            weights.finish()
        except ModelLoadError as error:
            refusals.append(str(error))
    assert len(refusals) > NUM_CASES // 2
    for message in refusals:
        assert "\n" not in message
        assert str(file) in message


@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_safetensors_header_longer_than_its_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        SafetensorsWeights([file], device=torch.device("cpu"), dtype=None, act_dtype=torch.float32)
