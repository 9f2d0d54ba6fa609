"""Quantized files in each layout: the model's logits and tokens are those of its dequantized twin.

``OCTAVO_WRITE_DOCS=1`` writes what is proven here into docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from fidelity import make_prompt
from safetensors.torch import load_file, save_file

from octavo.sampling_params import SamplingParams


@dataclass(frozen=True)
class Case:
    """One layout. ``row``: its line of the docs; ``dense``: parts of names left as trained."""

    name: str
    row: str
    config: Mapping[str, Any]
    write: files.Writer
    dense: tuple[str, ...] = ("lm_head",)
    family: str = "Llama"
    model: Mapping[str, Any] = field(default_factory=dict)


AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
# No multiples of 128, and other than the 64 and 96 of most cases.
RAGGED = {"hidden_size": 192, "intermediate_size": 320}
# One part of each fused layer differs from the others.
SPLIT = ("lm_head", "layers.0.self_attn.k_proj", "layers.1.mlp.up_proj")


def gptq(**values: Any) -> dict[str, Any]:
    return GPTQ | values


def ct(weights: Mapping[str, Any], form: str = "pack-quantized", **values: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return config | values


def ints(bits: int, size: int, sym: bool = True) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": "int", "symmetric": sym, **strategy}


def floats(strategy: str, **values: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **values}


def four_or_eight(name: str) -> int:
    return 8 if "down_proj" in name else 4


def by_dynamic(name: str) -> int:
    return 16 if "layers.1.mlp" in name else four_or_eight(name)


TWO_GROUPS = {
    "group_0": {"targets": ["Linear"], "weights": ints(4, 32)},
    "group_1": {"targets": ["re:.*down_proj"], "weights": ints(8, 32)},
}
INPUT_SCALE = {"input_scale": torch.tensor([1.0])}
GPTQ_ROW = "GPTQ v1 and v2; 2, 3, 4, 8 bits; sym and asym; desc_act; lm_head; dynamic"
PACK_ROW = "compressed-tensors pack-quantized; 2, 3, 4, 8 bits; sym and asym; actorder"
FLOAT_ROW = "compressed-tensors float-quantized: FP8 by tensor, channel, block"
FP8_ROW = "`fp8`: weight_scale_inv by block or tensor"
BNB_ROW = "bitsandbytes nf4, fp4 (double quantization too), int8"
AUTO_ROW = "auto-round, packed as GPTQ or AWQ, scales of either sign"

CASES = [
    Case("awq-gemm", "AWQ gemm", AWQ | {"group_size": 32}, files.awq_gemm(32)),
    Case("awq-whole-k", "AWQ gemm", AWQ | {"group_size": -1}, files.awq_gemm(-1)),
    Case("awq-split", "AWQ gemm", AWQ | {"q_group_size": 16}, files.awq_gemm(16), SPLIT),
    Case(
        "awq-gemv",
        "AWQ gemv",
        AWQ | {"group_size": 32, "version": "gemv"},
        files.awq_gemv(32, 2),
    ),
    *(
        Case(
            f"gptq-{bits}bit-{'v1' if v1 else 'v2'}",
            GPTQ_ROW,
            gptq(bits=bits, sym=False, checkpoint_format="gptq" if v1 else "gptq_v2"),
            files.gptq(bits, 32, v1=v1),
        )
        for bits in (2, 3, 4, 8)
        for v1 in (True, False)
    ),
    Case("gptq-sym", GPTQ_ROW, GPTQ, files.gptq(4, 32, v1=True, sym=True, g_idx=False)),
    Case("gptq-zero-bias", GPTQ_ROW, GPTQ, files.gptq(4, 32, v1=True, sym=True, bias=True)),
    Case(
        "gptq-desc-act",
        GPTQ_ROW,
        gptq(desc_act=True, sym=False),
        files.gptq(4, 32, v1=True, desc_act=True),
    ),
    Case("gptq-whole-k", GPTQ_ROW, gptq(group_size=-1), files.gptq(4, -1, v1=True, sym=True)),
    Case("gptq-ragged-group", GPTQ_ROW, gptq(group_size=40), files.gptq(4, 40, v1=True)),
    Case("gptq-lm-head", GPTQ_ROW, gptq(lm_head=True), files.gptq(4, 32, v1=True), ()),
    Case(
        "gptq-tied",
        GPTQ_ROW,
        gptq(),
        files.gptq(4, 32, v1=True),
        model={"tie_word_embeddings": True},
    ),
    Case(
        "gptq-dynamic",
        GPTQ_ROW,
        gptq(dynamic={r"-:.*\.layers\.1\.mlp": {}, r"+:.*down_proj": {"bits": 8}}),
        files.gptq(by_dynamic, 32, v1=True),
    ),
    Case("gptq-moe", GPTQ_ROW, gptq(), files.gptq(4, 32, v1=True), family="Mixtral"),
    Case(
        "gptq-biases",
        GPTQ_ROW,
        gptq(desc_act=True),
        files.gptq(4, 32, v1=True, desc_act=True),
        SPLIT,
        family="Qwen2",
    ),
    Case(
        "auto-round-gptq",
        AUTO_ROW,
        gptq(quant_method="auto-round", packing_format="auto_round:auto_gptq"),
        files.gptq(4, 32, v1=True, sym=True, negative=True),
    ),
    Case(
        "auto-round-extra",
        AUTO_ROW,
        gptq(
            quant_method="auto-round",
            packing_format="auto_round:auto_gptq",
            extra_config={".*down_proj": {"bits": 8}},
        ),
        files.gptq(four_or_eight, 32, v1=True, sym=True, negative=True),
    ),
    Case(
        "auto-round-awq",
        AUTO_ROW,
        gptq(quant_method="auto-round", packing_format="auto_round:auto_awq"),
        files.awq_gemm(32),
    ),
    *(
        Case(
            f"ct-w{bits}-{'sym' if sym else 'asym'}",
            PACK_ROW,
            ct(ints(bits, 32, sym)),
            files.ct_packed(bits, 32, sym=sym),
        )
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
    ),
    Case("ct-channel", PACK_ROW, ct(ints(4, -1)), files.ct_packed(4, -1, sym=True), SPLIT),
    Case(
        "ct-actorder",
        PACK_ROW,
        ct(ints(4, 32, False) | {"actorder": "group"}),
        files.ct_packed(4, 32, sym=False, actorder=True),
    ),
    Case(
        "ct-two-groups",
        PACK_ROW,
        ct({}, config_groups=TWO_GROUPS, ignore=["re:.*lm_head"]),
        files.ct_packed(four_or_eight, 32, sym=True),
    ),
    Case("ct-moe", PACK_ROW, ct(ints(4, 32)), files.ct_packed(4, 32, sym=True), family="Mixtral"),
    Case(
        "ct-int8",
        "compressed-tensors int-quantized (W8A8)",
        ct(ints(8, -1), "int-quantized"),
        files.int8(),
    ),
    Case(
        "ct-int8-asym",
        "compressed-tensors int-quantized (W8A8)",
        ct(ints(8, -1, False), "int-quantized"),
        files.int8(sym=False),
    ),
    Case(
        "ct-fp8-tensor",
        FLOAT_ROW,
        ct(floats("tensor"), "float-quantized"),
        files.fp8("weight_scale", extra=INPUT_SCALE, dtype=torch.bfloat16),
    ),
    Case(
        "ct-fp8-channel",
        FLOAT_ROW,
        ct(floats("channel"), "float-quantized"),
        files.fp8("weight_scale", rows=True, dtype=torch.bfloat16),
    ),
    Case(
        "ct-fp8-block",
        FLOAT_ROW,
        ct(floats("block", block_structure=[128, 128]), "float-quantized"),
        files.fp8("weight_scale", (128, 128)),
        model=RAGGED,
    ),
    Case(
        "fp8-block",
        FP8_ROW,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        files.fp8("weight_scale_inv", (128, 128)),
        SPLIT,
        model=RAGGED,
    ),
    Case(
        "fp8-ue8m0",
        FP8_ROW,
        {"quant_method": "fp8", "weight_block_size": [40, 56], "scale_fmt": "ue8m0"},
        files.fp8("weight_scale_inv", (40, 56), power=True, dtype=torch.float8_e8m0fnu),
    ),
    Case(
        "fp8-tensor",
        FP8_ROW,
        {"quant_method": "fp8", "activation_scheme": "static"},
        files.fp8("weight_scale_inv", shape=(), extra={"activation_scale": torch.tensor(1.0)}),
    ),
    Case(
        "fp8-tensor-vllm",
        FP8_ROW,
        {"quant_method": "fp8", "activation_scheme": "static"},
        files.fp8("weight_scale", shape=(), extra=INPUT_SCALE),
    ),
    Case(
        "fp8-moe",
        FP8_ROW,
        {"quant_method": "fp8", "weight_block_size": [40, 56]},
        files.fp8("weight_scale_inv", (40, 56)),
        family="Mixtral",
    ),
    Case(
        "fbgemm-fp8",
        "`fbgemm_fp8`",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        files.fp8("weight_scale", rows=True),
    ),
    Case(
        "modelopt-fp8",
        "`modelopt` FP8",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        files.fp8("weight_scale", shape=(), extra=INPUT_SCALE),
    ),
    *(
        Case(
            f"bnb-{kind}{'-double' if double else ''}",
            BNB_ROW,
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": double,
            },
            files.bnb4(kind, codes, double=double),
        )
        for kind, codes in (("nf4", files.NF4), ("fp4", files.FP4))
        for double in (False, True)
    ),
    Case(
        "bnb-int8",
        BNB_ROW,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        files.bnb8(),
        SPLIT,
    ),
]
BY_NAME = {case.name: case for case in CASES}


def save(case: Case, save_tiny: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """(the quantized folder, its dequantized twin)."""
    path, _ = save_tiny(case.family, num_hidden_layers=2, **case.model)
    modules = files.requantize(path, tmp_path / "twin", case.write, case.config, case.dense)
    assert len(modules) > 8
    return path, tmp_path / "twin"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_tokens_are_the_twins(
    case: Case, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, twin = save(case, save_tiny, tmp_path)
    prompt = make_prompt(40)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for backend in ("reference", "native"):
        engine, other = (driver(p, attention_backend=backend) for p in (path, twin))
        torch.testing.assert_close(engine.logits(prompt), other.logits(prompt), atol=1e-3, rtol=0)
    tokens = [e.generate([prompt], greedy)[0].token_ids for e in (engine, other)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 3


def round_to_bfloat16(file: Path, dense: tuple[str, ...]) -> None:
    tensors = load_file(file)
    for name, tensor in tensors.items():
        prefix = name.removesuffix(".weight")
        if files.is_projection(name, tensor) and not any(part in f"{prefix}." for part in dense):
            tensors[name] = tensor.bfloat16()
    save_file(tensors, file)


@pytest.mark.parametrize("name", ["gptq-desc-act", "fp8-block", "bnb-nf4", "ct-moe"])
def test_in_bfloat16_the_weights_are_the_twins_rounded(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    prompt = make_prompt(40)
    for dtype in ("bfloat16", "auto"):
        if (
            dtype == "auto"
        ):  # Dense matrices keep float32 then, and those in place of planes do not.
            round_to_bfloat16(twin / "model.safetensors", BY_NAME[name].dense)
        want, got = (driver(p, dtype=dtype).logits(prompt) for p in (twin, path))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, msg=dtype)
