"""A GGUF file of each kind is computed with as it is: nothing rounded, in the file's own size.

Kinds of 3 bits and less whose elements are found in tables are dequantized as they are read.

The same numbers in a float32 file are the reference: both run through the whole engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_blocks import KINDS, halves_of, random_blocks, set_halves
from octavo.kernels.cpu.linear import CpuWeight
from octavo.kernels.formats.gguf import BLOCK_FORMATS
from octavo.kernels.formats.gguf_grids import GRIDS
from octavo.kernels.weights import Planes

# A whole number of super-blocks everywhere.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 256, 512, 2, 4, 2, 300
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
# What llama.cpp calls Q4_K_M: half of the layers' values and down projections have six bits, so
# that one fused projection holds two kinds.
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
# What a kind's first half is multiplied by, on average, over what the second one is.
MIDDLE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
# Of a weight over its file, in percent: scales of 4 and 6 bits are bytes, and rows are rounded up to
# whole panels.
SURPLUS = {"Q2_K": 20, "Q3_K": 5}


def random_tensor(kind: str, shape: tuple[int, int], seed: int) -> Planes:
    """Any integers, scaled to weights of a standard deviation of about 0.05 and a mean near 0."""
    torch.manual_seed(seed)
    blocks = random_blocks(kind, *shape).view(-1, BLOCK_FORMATS[kind].nbytes)

    def scaled(d: torch.Tensor) -> Planes:
        set_halves(kind, blocks, d)
        if kind in MIDDLE:
            at = halves_of(kind)[1]
            second = (d * MIDDLE[kind]).to(torch.float16)[:, None]
            blocks[:, at : at + 2] = second.view(torch.uint8)
        return Planes(kind, {"blocks": blocks.view(shape[0], -1)}, shape)

    spread = scaled(torch.ones(len(blocks))).dequantize().std()
    return scaled(0.05 / spread * (torch.rand(len(blocks)) + 0.5))


def write(file: Path, kinds: Mapping[str, str], default: str, plain: bool) -> int:
    """A tiny Llama whose matrices have these kinds, or their values in float32; bytes of them."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    names |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in MATRICES.items()}
    nbytes = 0
    for seed, (name, shape) in enumerate(names.items()):
        kind = kinds.get(name.split(".")[-1], default)
        tensor = random_tensor(kind, shape, seed)
        nbytes += tensor.nbytes
        if plain:
            writer.add_tensor(f"{name}.weight", tensor.dequantize().numpy())
        else:
            data = tensor.planes["blocks"].numpy()
            writer.add_tensor(f"{name}.weight", data, raw_dtype=Kind[kind])
    norms = ["output_norm"] + [
        f"blk.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm")
    ]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return nbytes


@pytest.mark.parametrize("case", [*KINDS, "Q4_K_M"])
def test_a_file_is_its_dequantized_weights(
    case: str, driver: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, kinds = ("Q4_K", MIXED) if case == "Q4_K_M" else (case, {})
    nbytes = write(tmp_path / "quantized.gguf", kinds, default, plain=False)
    write(tmp_path / "plain.gguf", kinds, default, plain=True)
    token_ids = random.Random(0).choices(range(3, VOCAB), k=50)
    expected = driver(tmp_path / "plain.gguf").logits(token_ids)
    assert 0.3 < expected.std() < 10
    weights = []
    init = CpuWeight.__init__

    def remember(self: CpuWeight, *args: Any) -> None:
        init(self, *args)
        weights.append(self)

    monkeypatch.setattr(CpuWeight, "__init__", remember)
    found = driver(tmp_path / "quantized.gguf").logits(token_ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    if case in GRIDS:
        assert {weight.format for weight in weights} <= {"F32", "BF16"}
        return
    taken = sum(weight.nbytes for weight in weights)
    assert nbytes <= taken < (1 + SURPLUS.get(case, 4) / 100) * nbytes
    assert any("+" in weight.format for weight in weights) == (case == "Q4_K_M")
