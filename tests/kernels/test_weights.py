"""Planes: formats agree with the Rust core, and a shard's parts together are the whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_blocks import KINDS, random_blocks
from octavo._core import GgufFile
from octavo.kernels import reference
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.formats.registry import find_format
from octavo.kernels.weights import (
    Columns,
    Part,
    Planes,
    Rows,
    Stored,
    beside,
    dense,
    part_of,
    quantize,
    reordered,
    share,
    stack,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_planes(name: str, n: int, k: int, order: torch.Tensor | None = None) -> Planes:
    return Planes(name, {"blocks": random_blocks(name, n, k)}, (n, k), order)


@pytest.mark.parametrize("name", KINDS)
def test_the_two_decoders_agree_to_the_bit(name: str, tmp_path: Path) -> None:
    """The reference in Python and the Rust core's, which reads files."""
    planes = random_planes(name, 5, 512)
    file = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    kind = gguf.GGMLQuantizationType[name]
    writer.add_tensor("x", planes.planes["blocks"].numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = np.empty((5, 512), np.float32)
    GgufFile(str(file)).dequantize("x", out)
    assert torch.equal(planes.dequantize(), torch.from_numpy(out))


@pytest.mark.parametrize("name", list(BLOCK_FORMATS))
def test_sizes_are_those_of_the_files(name: str) -> None:
    found = BLOCK_FORMATS[name]
    assert (found.block, found.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def sources(k: int) -> list[Stored]:
    order = torch.randperm(10)
    planes = [random_planes(name, 10, k) for name in KINDS]
    return [
        torch.randn(10, k),
        torch.randn(10, k).bfloat16(),
        *planes,
        *(reordered(weight, order) for weight in planes),
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_together_are_the_whole(count: int) -> None:
    """Rows to be stacked, columns to be summed: K is split between blocks, evenly or not."""
    for weight in sources(512):
        whole = dense(weight)
        block = block_of(weight)
        rows = [Rows((share(10, i, count),)) for i in range(count)]
        columns = [Columns(*share(512, i, count, block)) for i in range(count)]
        parts = {
            kind: [part_of(weight, part) for part in of_kind]
            for kind, of_kind in ((Rows, rows), (Columns, columns))
        }
        assert torch.equal(torch.cat([dense(p) for p in parts[Rows]]), whole)
        assert torch.equal(torch.cat([dense(p) for p in parts[Columns]], 1), whole)
        for part in (*parts[Rows], *parts[Columns]):
            assert type(part) is type(weight)
    assert part_of(whole, None) is whole


def block_of(weight: Stored) -> int:
    return 1 if isinstance(weight, torch.Tensor) else find_format(weight.format).block


def test_backends_compute_with_parts() -> None:
    x = torch.randn(3, 512)
    for weight in sources(512):
        want = reference.linear(x, dense(weight).float())
        for prepare in (reference.prepare, cpu.prepare):
            rows = [
                prepare([part_of(weight, Rows((share(10, i, 2),)))], exact=True) for i in range(2)
            ]
            found = torch.cat([part.linear(x) for part in rows], 1)
            torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-4)
            halves = [part_of(weight, Columns(256 * i, 256 * (i + 1))) for i in range(2)]
            columns = [prepare([half], exact=True) for half in halves]
            found = sum(
                part.linear(x[:, 256 * i : 256 * (i + 1)].contiguous())
                for i, part in enumerate(columns)
            )
            torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-4)


def test_ranges_of_rows_are_joined_in_order() -> None:
    """As a rank's q, k and v lie in a fused projection."""
    for weight in sources(512):
        whole = dense(weight)
        found = dense(part_of(weight, Rows(((6, 10), (0, 3)))))
        assert torch.equal(found, torch.cat([whole[6:10], whole[:3]]))


def test_ranges_of_columns_are_joined_in_order() -> None:
    """As a rank's value heads lie in a file that has the first of every key head, then the second."""
    ranges = (Columns(256, 512), Columns(0, 256))
    for weight in (torch.randn(10, 768), quantize(torch.randn(10, 768), "Q4_1")):
        whole = dense(weight)
        found = beside([part_of(weight, part) for part in ranges])
        assert tuple(found.shape) == (10, 512)
        assert torch.equal(dense(found), torch.cat([whole[:, 256:512], whole[:, :256]], 1))
    q4, q8 = quantize(torch.randn(10, 64), "Q4_1"), quantize(torch.randn(10, 64), "Q8_0")
    with pytest.raises(ValueError, match="cannot be joined along K"):
        beside([q4, q8])


def test_a_cut_block_is_refused() -> None:
    with pytest.raises(ValueError, match="columns 0 to 40 of 64 cut a block of 32 elements"):
        part_of(quantize(torch.randn(2, 64), "Q4_1"), Columns(0, 40))


@pytest.mark.parametrize("part", [Rows(((2, 5),)), Rows(((-1, 2),)), Columns(3, 2)])
def test_parts_that_do_not_exist_are_refused(part: Part) -> None:
    with pytest.raises(ValueError, match="there is no part"):
        part_of(torch.zeros(4, 4), part)


def test_shares_are_between_blocks() -> None:
    assert [share(768, i, 2, 256) for i in range(2)] == [(0, 256), (256, 768)]
    with pytest.raises(ValueError, match="whole number of units"):
        share(700, 0, 2, 256)
    with pytest.raises(ValueError, match="there is no share"):
        share(700, 2, 2)


def test_orders_are_joined() -> None:
    weight = quantize(torch.randn(6, 32), "Q8_0")
    first, second = torch.randperm(6), torch.randperm(6)
    twice = reordered(reordered(weight, first), second)
    assert torch.equal(dense(twice), weight.dequantize()[first][second])


def test_stacks() -> None:
    parts = [random_planes("Q4_K", n, 256, torch.randperm(n)) for n in (3, 5)]
    assert torch.equal(stack(parts).dequantize(), torch.cat([p.dequantize() for p in parts]))
    with pytest.raises(ValueError, match="several formats"):
        stack([parts[0], random_planes("Q8_0", 3, 256)])
    with pytest.raises(ValueError, match="one K"):
        stack([parts[0], random_planes("Q4_K", 3, 512)])
    with pytest.raises(ValueError, match="no weights"):
        stack([])
