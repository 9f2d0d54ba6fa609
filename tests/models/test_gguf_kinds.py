"""A GGUF file of each kind is computed with as it is: nothing rounded, in the file's own size.

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

from octavo.kernels.cpu.linear import CpuWeight
from octavo.kernels.formats.gguf import BLOCK_FORMATS
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
EVERY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
# What llama.cpp calls Q4_K_M: half of the layers' values and down projections have six bits, so
# that one fused projection holds two kinds.
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
# The middle of a kind's integers, and the root of the mean square of what they are multiplied by.
MIDDLE = {"Q4_1": 7.5, "Q5_1": 15.5, "Q4_K": 7.5, "Q5_K": 15.5}
SPREAD = {"Q4_0": 5, "Q4_1": 5, "Q5_0": 9, "Q5_1": 9, "Q8_0": 74, "Q4_K": 180, "Q5_K": 340}


def random_tensor(kind: str, shape: tuple[int, int], seed: int) -> Planes:
    """Any integers, scaled to weights of a standard deviation of about 0.05 and a mean near 0."""
    rng = np.random.default_rng(seed)
    elements, nbytes = BLOCK_FORMATS[kind].block, BLOCK_FORMATS[kind].nbytes
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // elements, nbytes), dtype=np.uint8)
    d = 0.05 / SPREAD.get(kind, 18 * 74) * rng.uniform(0.5, 1.5, (len(blocks), 1))
    if kind == "Q6_K":
        blocks[:, 208:] = d.astype(np.float16).view(np.uint8)
    else:
        blocks[:, :2] = d.astype(np.float16).view(np.uint8)
    if kind in MIDDLE:
        m = d * MIDDLE[kind] * (1 if kind.endswith("K") else -1)
        blocks[:, 2:4] = m.astype(np.float16).view(np.uint8)
    return Planes(kind, {"blocks": torch.from_numpy(blocks.reshape(shape[0], -1))}, shape)


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


@pytest.mark.parametrize("case", [*EVERY, "Q4_K_M"])
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
    taken = sum(weight.nbytes for weight in weights)
    # The surplus: 6-bit scales as bytes, and rows rounded up to whole panels.
    assert nbytes <= taken < 1.04 * nbytes
    assert any("+" in weight.format for weight in weights) == (case == "Q4_K_M")
