"""GgufFile: reads what the gguf package writes, and numbers as it computes them."""

import gc
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_blocks import KINDS, random_blocks, set_halves
from octavo._core import GgufFile
from octavo.kernels.formats.gguf import BLOCK_FORMATS

WriteGguf = Callable[[Callable[[gguf.GGUFWriter], Any]], str]


def random_data(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random bytes of a kind; scales are finite, subnormal ones included."""
    torch.manual_seed(0)
    form = BLOCK_FORMATS[kind]
    blocks = random_blocks(kind, rows, columns).view(-1, form.nbytes)
    scales = torch.randn(len(blocks))
    scales[::7] = 6e-8 * torch.randint(0, 1000, scales[::7].shape)
    set_halves(kind, blocks, scales)
    return blocks.view(rows, -1).numpy()


def dequantize(file: GgufFile, name: str) -> np.ndarray:
    shape, *_ = file.tensors()[name]
    out = np.full(shape, np.nan, np.float32)
    file.dequantize(name, out)
    return out


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 512), (700, 1024)])
def test_blocks_become_the_numbers_gguf_computes(
    name: str, rows: int, columns: int, write_gguf: WriteGguf
) -> None:
    """As the Rust core reads them, and as their definition does."""
    data, kind = random_data(name, rows, columns), Kind[name]
    file = GgufFile(write_gguf(lambda w: w.add_tensor("x", data, raw_dtype=kind)))
    assert file.tensors()["x"][:2] == ((rows, columns), kind.name)
    assert bytes(file.data("x")) == data.tobytes()
    want = gguf.dequantize(data, kind)
    np.testing.assert_array_equal(dequantize(file, "x"), want)
    blocks = torch.from_numpy(data)
    found = BLOCK_FORMATS[name].dequantize({"blocks": blocks}, (rows, columns))
    np.testing.assert_array_equal(found.numpy(), want)


def test_floats_keep_their_value(write_gguf: WriteGguf) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    singles = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    brains = np.arange(65536, dtype=np.uint16)

    def fill(w: gguf.GGUFWriter) -> None:
        w.add_tensor("f16", halves)
        w.add_tensor("f32", singles)
        w.add_tensor("bf16", brains.view(np.uint8), raw_dtype=Kind.BF16)

    file = GgufFile(write_gguf(fill))
    np.testing.assert_array_equal(dequantize(file, "f16"), halves.astype(np.float32))
    assert dequantize(file, "f32").tobytes() == singles.tobytes()
    expected = (brains.astype(np.uint32) << 16).view(np.float32)
    assert dequantize(file, "bf16").tobytes() == expected.tobytes()


def test_metadata_has_python_types_and_leaves_long_arrays(write_gguf: WriteGguf) -> None:
    def fill(w: gguf.GGUFWriter) -> None:
        w.add_uint8("u8", 255)
        w.add_int64("i64", -(2**62))
        w.add_uint64("u64", 2**63)
        w.add_float32("f32", 0.5)
        w.add_bool("flag", True)
        w.add_string("text", 'é "quoted" 😀')
        w.add_array("short", [1, 2, 3])
        w.add_array("names", ["a", "é"])
        w.add_array("full", list(range(256)))
        w.add_array("long", list(range(257)))

    metadata = GgufFile(write_gguf(fill)).metadata()
    assert metadata["general.architecture"] == "llama"
    assert metadata["u8"] == 255
    assert metadata["i64"] == -(2**62)
    assert metadata["u64"] == 2**63
    assert metadata["f32"] == 0.5
    assert metadata["flag"] is True
    assert metadata["text"] == 'é "quoted" 😀'
    assert metadata["short"] == [1, 2, 3]
    assert metadata["names"] == ["a", "é"]
    assert metadata["full"] == list(range(256))
    assert "long" not in metadata


def test_data_is_read_only_and_outlives_the_file_object(write_gguf: WriteGguf) -> None:
    data = np.arange(1000, dtype=np.float32)
    file = GgufFile(write_gguf(lambda w: w.add_tensor("x", data)))
    view = file.data("x")
    assert view.readonly
    assert view.nbytes == 4000
    with pytest.raises(TypeError):
        view[0] = 1
    array = np.frombuffer(view, np.float32)
    os.unlink(file.path)
    del file, view
    gc.collect()
    np.testing.assert_array_equal(array, data)


def test_out_must_fit(write_gguf: WriteGguf) -> None:
    file = GgufFile(write_gguf(lambda w: w.add_tensor("x", np.zeros((4, 8), np.float32))))
    file.dequantize("x", np.empty(32, np.float32))
    file.dequantize("x", memoryview(np.empty(32, np.float32)))
    with pytest.raises(ValueError, match="out has 31 elements, the tensor 32"):
        file.dequantize("x", np.empty(31, np.float32))
    with pytest.raises(TypeError, match="float32"):
        file.dequantize("x", np.empty(32, np.float64))
    with pytest.raises(TypeError, match="float32"):
        file.dequantize("x", [0.0] * 32)
    with pytest.raises(ValueError, match="contiguous"):
        file.dequantize("x", np.empty(64, np.float32)[::2])
    frozen = np.empty(32, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        file.dequantize("x", frozen)
    for use in (file.data, lambda name: file.dequantize(name, frozen.copy())):
        with pytest.raises(ValueError, match='no tensor is named "y"'):
            use("y")


def test_a_kind_without_conversion_is_named(write_gguf: WriteGguf) -> None:
    data = np.zeros((1, 84), np.int16)
    file = GgufFile(write_gguf(lambda w: w.add_tensor("x", data)))
    assert file.tensors()["x"][1] == "I16"
    assert bytes(file.data("x")) == data.tobytes()
    with pytest.raises(ValueError, match=r'tensor "x": I16 cannot be converted'):
        file.dequantize("x", np.empty((1, 84), np.float32))


def test_errors_are_one_line_that_names_the_file(tmp_path: Path, write_gguf: WriteGguf) -> None:
    whole = Path(write_gguf(lambda w: w.add_tensor("x", np.zeros(100, np.float32)))).read_bytes()
    damaged = {
        "empty": b"",
        "text": b"hello, this is no checkpoint",
        "cut": whole[:-200],
        "header": whole[:30],
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            GgufFile(str(path))
        assert "\n" not in str(error.value)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=path.name):
            GgufFile(str(path))


def test_every_tensor_of_a_real_model(smollm2_path: str) -> None:
    file = GgufFile(smollm2_path)
    tensors = file.tensors()
    kinds = Counter(kind for _, kind, _, _ in tensors.values())
    assert kinds == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert sum(math.prod(shape) for shape, *_ in tensors.values()) == 134_515_008
    # They fill the file's end without gaps but the alignment's.
    places = sorted((offset, nbytes) for _, _, offset, nbytes in tensors.values())
    for (offset, nbytes), (following, _) in itertools.pairwise(places):
        assert following == (offset + nbytes + 31) // 32 * 32
    assert sum(places[-1]) <= os.path.getsize(smollm2_path) < sum(places[-1]) + 32
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_norm.weight"):
        (rows, *_), kind, _, _ = tensors[name]
        data = np.frombuffer(file.data(name), np.uint8).reshape(rows, -1)[-300:]
        expected = gguf.dequantize(data, Kind[kind]) if kind != "F32" else data.view(np.float32)
        np.testing.assert_array_equal(dequantize(file, name)[-300:], expected.squeeze())


def test_opening_and_converting_take_no_noticeable_time(smollm2_path: str) -> None:
    """Bounds ten times what a quiet machine needs: they catch a copy of the file, not noise."""
    start = time.perf_counter()
    file = GgufFile(smollm2_path)
    assert time.perf_counter() - start < 0.4
    shape, *_ = file.tensors()["token_embd.weight"]
    out = np.zeros(shape, np.float32)
    start = time.perf_counter()
    file.dequantize("token_embd.weight", out)
    assert time.perf_counter() - start < 0.5


def test_released_pages_leave_memory_and_come_again(write_gguf: WriteGguf) -> None:
    values = np.arange(8 << 20, dtype=np.float32)
    file = GgufFile(write_gguf(lambda w: w.add_tensor("big", values)))

    def mapped_kib() -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            pytest.skip("no /proc here")
        [line] = [x for x in status.read_text().splitlines() if x.startswith("RssFile")]
        return int(line.split()[1])

    data = file.data("big")
    assert np.array_equal(np.frombuffer(data, np.float32), values)
    before = mapped_kib()
    file.release_pages()
    assert mapped_kib() < before - 30_000
    assert np.array_equal(np.frombuffer(data, np.float32), values)
