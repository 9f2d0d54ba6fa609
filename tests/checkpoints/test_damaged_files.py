"""Checkpoint headers with random damage, and made-up ones: an error or a file within its bounds,
never a crash, never memory that the file does not have."""

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

from octavo.checkpoints.safetensors import SafetensorsWeights
from octavo.errors import ModelLoadError

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


# Headers that follow the formats, with numbers that do not: hypothesis chooses them. In a process of
# its own too; what it may allocate beyond its start is far less than the smallest size believed.
MADE_UP = """
import json, resource, struct, sys
from pathlib import Path
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from octavo._core import GgufFile, Tokenizer
from octavo.errors import ModelLoadError
from octavo.checkpoints.safetensors import SafetensorsWeights

file, cases, seen = Path(sys.argv[1]), int(sys.argv[2]), [0, 0]
config = settings(
    max_examples=cases,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
edges = [0, 1, 2, 31, 32, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1]
number = st.one_of(st.sampled_from(edges), st.integers(0, 64))
text = st.one_of(
    st.sampled_from(["general.architecture", "general.alignment", "tokenizer.ggml.tokens", "a"]),
    st.text(max_size=8),
)

def packed(value):
    return struct.pack("<Q", value)

def string(s):
    data = s.encode("utf-8", "replace")
    return packed(len(data)) + data

lying = st.builds(lambda n, s: packed(n) + s.encode("utf-8", "replace"), number, text)
strings = st.one_of(text.map(string), text.map(string), lying)
arrays = st.builds(
    lambda kind, n, data: struct.pack("<I", kind) + packed(n) + data,
    st.integers(0, 13), number, st.binary(max_size=40),
)
kinds = st.integers(0, 13)
values = st.one_of(
    st.tuples(st.just(8), strings), st.tuples(st.just(9), arrays),
    st.tuples(kinds, st.binary(max_size=16)),
)
pair = st.builds(lambda k, v: k + struct.pack("<I", v[0]) + v[1], strings, values)
tensor = st.builds(
    lambda name, dims, kind, offset: name + struct.pack("<I", len(dims))
    + b"".join(map(packed, dims)) + struct.pack("<I", kind) + packed(offset),
    strings, st.lists(number, max_size=6), st.integers(0, 40), number,
)
mostly_none = st.tuples(st.integers(0, 7), number).map(lambda t: t[1] if t[0] == 5 else None)
items = st.lists(pair, max_size=4), st.lists(tensor, max_size=4)

@config
@given(*items, mostly_none, mostly_none, st.binary(max_size=300))
def gguf_files(pairs, tensors, num_pairs, num_tensors, rest):
    counts = [given if given is not None else len(own)
              for given, own in ((num_tensors, tensors), (num_pairs, pairs))]
    data = b"GGUF" + struct.pack("<I", 3) + b"".join(map(packed, counts))
    data += b"".join(pairs) + b"".join(tensors) + rest
    file.write_bytes(data)
    try:
        found = GgufFile(str(file))
        found.metadata()
        for name, (_shape, _kind, offset, nbytes) in found.tensors().items():
            assert offset + nbytes <= len(data)
            assert found.data(name).nbytes == nbytes
        seen[0] += 1
        Tokenizer.from_gguf(found)
    except ValueError as error:
        assert "\\n" not in str(error)

anything = st.one_of(number, st.none(), st.text(max_size=3), st.lists(number, max_size=3))
dtype = st.sampled_from(["F32", "BF16", "F16", "I64", "F64", "U8", "F8_E4M3", "X"])
entry = st.one_of(
    st.fixed_dictionaries({
        "dtype": dtype,
        "shape": st.lists(number, max_size=4),
        "data_offsets": st.lists(number, min_size=2, max_size=2),
    }),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), anything),
    anything,
)

@config
@given(
    st.dictionaries(text, st.integers(0, 8), max_size=3),
    st.dictionaries(text, entry, max_size=1),
    mostly_none,
    mostly_none,
)
def safetensors_files(sizes, wrong, length, rest):
    # Tensors one behind the other, as it should be, and then what should not be.
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]}
        end += 4 * size
    header |= wrong
    encoded = json.dumps(header).encode()
    data = packed(len(encoded) if length is None else length) + encoded
    data += bytes(end if rest is None else min(rest, 100))
    file.write_bytes(data)
    cpu = torch.device("cpu")
    try:
        weights = SafetensorsWeights([file], device=cpu, dtype=None, act_dtype=torch.float32)
        for name in header:
            size = weights.num_rows(name)
            assert weights.vector(name, size).nbytes <= len(data)
        weights.finish()
        seen[1] += 1
    except ModelLoadError as error:
        assert "\\n" not in str(error)
        assert str(file) in str(error)

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
gguf_files()
safetensors_files()
print(*seen)
"""


def test_made_up_headers(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "made-up"), "700"]
    done = subprocess.run(
        [sys.executable, "-c", MADE_UP, *arguments], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Some are whole: otherwise nothing behind the first check was tried.
    assert all(int(count) > 10 for count in done.stdout.split())


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
            for name, shape in (("a", (3, 32)), ("b", (32, 3))):
                found = weights.linear(name, shape)
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
