"""Quantized files in each layout: the model's logits and tokens are those of its dequantized twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from fidelity import make_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.checkpoints.safetensors import TENSOR_KINDS
from octavo.checkpoints.schemes.cut import Window, taken
from octavo.checkpoints.schemes.registry import REFUSED, find_scheme
from octavo.checkpoints.weights import check_shape
from octavo.errors import ModelLoadError
from octavo.kernels.formats.dense import DENSE_DTYPES
from octavo.kernels.weights import Columns, Part, Rows, dense, share
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
FLOAT_ROW = "compressed-tensors float-quantized: FP8 by tensor, channel, block; mxfp8-quantized"
FP4_ROW = "compressed-tensors nvfp4-pack-quantized and mxfp4-pack-quantized"
FP8_ROW = "`fp8`: weight_scale_inv by block or tensor"
MODELOPT_ROW = "`modelopt` FP8 (tensor, row, block) and NVFP4"
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
    Case("ct-lm-head", PACK_ROW, ct(ints(4, 32), ignore=[]), files.ct_packed(4, 32, sym=True), ()),
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
        MODELOPT_ROW,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        files.fp8("weight_scale", shape=(), extra=INPUT_SCALE),
    ),
    Case(
        "modelopt-nvfp4",
        MODELOPT_ROW,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        files.fp4("modelopt", "weight", 16),
        SPLIT,
    ),
    Case(
        "ct-nvfp4",
        FP4_ROW,
        ct(floats("tensor_group", group_size=16) | {"num_bits": 4}, "nvfp4-pack-quantized"),
        files.fp4("ct", "weight_packed", 16),
    ),
    Case(
        "ct-mxfp4",
        FP4_ROW,
        ct(floats("group", group_size=32) | {"num_bits": 4}, "mxfp4-pack-quantized"),
        files.fp4("mx", "weight_packed", 32),
    ),
    Case(
        "ct-mxfp8",
        FLOAT_ROW,
        ct(floats("group", group_size=32), "mxfp8-quantized"),
        files.changed(
            files.fp8("weight_scale", (1, 32), power=True, dtype=torch.float8_e8m0fnu),
            "weight_scale",
            lambda scale: scale.view(torch.uint8),
        ),
    ),
    Case(
        "modelopt-fp8-rows",
        MODELOPT_ROW,
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        files.changed(files.fp8("weight_scale", rows=True), "weight_scale", torch.flatten),
    ),
    Case(
        "modelopt-fp8-block",
        MODELOPT_ROW,
        {"quant_algo": "FP8_PB_WO", "producer": {"name": "modelopt"}},
        files.changed(
            files.fp8("weight_scale", (128, 128)),
            "weight_scale",
            lambda scale: scale[:, None, :, None],
        ),
        model=RAGGED,
    ),
    Case(
        "bnb-nf4-storage",
        BNB_ROW,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_storage": "bfloat16",
        },
        files.changed(
            files.bnb4("nf4", files.NF4, double=False),
            "weight",
            lambda packed: packed.view(-1).view(torch.bfloat16)[:, None],
        ),
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


@pytest.mark.parametrize(
    "name", ["gptq-sym", "awq-gemm", "ct-w8-asym", "ct-fp8-channel", "ct-nvfp4"]
)
def test_in_other_types_the_weights_keep_their_numbers(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    """``auto`` rounds activations a little; the twin's own weights are float32 then."""
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    prompt = make_prompt(40)
    want = driver(twin, dtype="auto").logits(prompt)
    rounded = (driver(twin, dtype="bfloat16").logits(prompt) - want).norm()
    for dtype, most in (("bfloat16", 0.9), ("auto", 0.5)):
        error = (driver(path, dtype=dtype).logits(prompt) - want).norm()
        assert error < most * rounded, dtype


class MemoryTensors:
    """Tensors by name, without a file."""

    dtype = torch.float32

    def __init__(self, tensors: dict[str, Tensor], device: str) -> None:
        self.device = torch.device(device)
        self.num_bytes = 0  # of what was read
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def kind(self, name: str) -> str:
        names = {dtype: kind for kind, dtype in TENSOR_KINDS.items()}
        return names[self._tensors[name].dtype]

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        part: Part | Window = None,
        stored: tuple[int, ...] | None = None,
        kinds: Mapping[str, torch.dtype] = DENSE_DTYPES,
    ) -> Tensor:
        check_shape("memory", name, self._tensors[name].shape, shape)
        assert self._tensors[name].dtype in kinds.values()
        found = self._tensors[name].view(stored or shape)
        found = found if part is None else taken(found, part)
        self.num_bytes += found.nbytes
        return found if dtype is None else found.to(dtype)


def prove_parts(case: Case, shape: tuple[int, int], device: str, most: float) -> None:
    """Rows and columns in three parts, of sizes that no group divides. ``most``: all parts' bytes
    over the whole's."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    prefix = "model.layers.0.self_attn.q_proj"
    written = case.write(prefix, torch.randn(shape))
    assert written is not None
    tensors = MemoryTensors(
        {f"{prefix}.{name}": tensor for name, tensor in written[0].items()}, device
    )
    scheme = find_scheme(case.config)
    scheme.linear(tensors, prefix, shape, None)
    num_bytes = tensors.num_bytes
    rows = [Rows((share(shape[0], i, 3),)) for i in range(3)]
    # Two elements, or sixteen, lie in one byte or scale.
    columns = [Columns(*share(shape[1], i, 3, 16)) for i in range(3)]
    for axis, parts in enumerate((rows, columns)):
        tensors.num_bytes = 0
        read = [dense(scheme.linear(tensors, prefix, shape, part)) for part in parts]
        assert num_bytes <= tensors.num_bytes <= most * num_bytes
        whole = torch.cat(read, axis)
        assert whole.device.type == device
        torch.testing.assert_close(whole.cpu(), written[1], atol=1e-6, rtol=1e-6)
    # Ranges that follow no unit's border, joined in another order.
    pieces = Rows(((33, 43), (0, 5), (7, 8)))
    joined = torch.cat([written[1][begin:end] for begin, end in pieces.ranges])
    found = dense(scheme.linear(tensors, prefix, shape, pieces))
    torch.testing.assert_close(found.cpu(), joined, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_shard_reads_its_part(case: Case, device: str) -> None:
    shape = (48, 80)
    if case.name in ("awq-gemm", "awq-gemv", "auto-round-awq"):
        shape = (48, 96)  # whole groups of 32
    elif case.name.startswith("bnb"):
        shape = (48, 192)  # whole blocks of 64
    # A part of 16 columns has half a group, and less than the 32 values of three words.
    prove_parts(case, shape, device, 1.6)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-fp4-double", "bnb-nf4-storage"])
def test_a_shard_reads_all_of_blocks_that_go_on_in_the_next_row(name: str) -> None:
    prove_parts(BY_NAME[name], (48, 80), "cpu", 3)


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_methods_that_are_not_read_are_refused_with_the_way_out(method: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"method '{method}' is not supported: .+") as error:
        find_scheme({"quant_method": method})
    assert "\n" not in str(error.value)
    with pytest.raises(ModelLoadError, match="'nobodys' is not supported: quantize the model anew"):
        find_scheme({"quant_method": "nobodys"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AWQ | {"bits": 8}, "awq: 8 bits"),
        (AWQ | {"version": "gemv_fast"}, "'gemv_fast' is not read; convert it to gemm"),
        (gptq(bits=5), "gptq: 5 bits"),
        (gptq(bits=None), r"quantization_config \(gptq\) cannot be read: TypeError"),
        (AWQ | {"group_size": "many"}, r"\(awq\) cannot be read: ValueError"),
        ({"quant_method": "gptq"}, r"\(gptq\) cannot be read: KeyError\('bits'\)"),
        (ct({"strategy": "group"}), r"cannot be read: KeyError\('group_size'\)"),
        (ct({}, config_groups=[1]), "cannot be read: AttributeError"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "cannot be read: TypeError"),
        (gptq(group_size=0), "group_size 0"),
        (gptq(checkpoint_format="marlin"), "'marlin' is not read; convert it to gptq"),
        (gptq(quant_method="auto-round", packing_format="auto_round:other"), "export it as"),
        (ct(ints(5, 32)), "group_0: 5 bits"),
        (ct(ints(4, 32), "marlin-24"), "'marlin-24' is not read"),
        (ct(ints(4, 32) | {"strategy": "other"}), "strategy 'other' is not read"),
        (ct({}, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not read"),
        (ct({}, transform_config={"config_groups": {"R1": {}}}), "transform_config is not read"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' is not read; export"),
        (gptq(is_marlin_format=True), "Marlin's own layout is not read; convert it to gptq"),
        ({"quant_method": "awq", "checkpoint_format": "gemv_fast"}, "'gemv_fast' is not read"),
    ],
)
def test_configs_that_are_not_read_are_refused(config: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        find_scheme(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("awq-gemm", {"group_size": 40}, "awq cannot hold 64 x 64 in groups of 40"),
        ("gptq-4bit-v1", {"bits": 8}, r"qweight has shape \[8, 64\], the config says \[16, 64\]"),
        (
            "ct-w4-sym",
            {"config_groups": {"g": {"weights": ints(8, 32)}}},
            "weight_packed has shape",
        ),
        ("fp8-block", {"weight_block_size": [64, 64]}, "not blocks of 64 x 64 of 192 x 192"),
        ("fp8-block", {"weight_block_size": None}, "not one scale, or one a row"),
    ],
)
def test_files_that_do_not_fit_their_config_are_refused(
    name: str,
    changes: Mapping[str, Any],
    message: str,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, _ = save(BY_NAME[name], save_tiny, tmp_path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=message):
        driver(path)


@pytest.mark.parametrize("name", ["gptq-lm-head", "ct-lm-head"])
def test_a_quantized_head_is_used_where_the_config_ties_it(
    name: str, save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    for folder in (path, twin):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    prompt = make_prompt(20)
    got, want = (driver(p).logits(prompt) for p in (path, twin))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("awq-gemm", ("awq", "awq_marlin")),
        ("gptq-sym", ("gptq", "gptq_marlin")),
        ("auto-round-gptq", ("auto-round", "auto_round", "inc")),
        ("ct-w4-sym", ("compressed-tensors",)),
        ("fp8-tensor", ("fp8",)),
        ("fbgemm-fp8", ("fbgemm_fp8",)),
        ("modelopt-nvfp4", ("modelopt", "modelopt_fp4")),
        ("bnb-nf4", ("bitsandbytes",)),
    ],
)
def test_the_flag_may_name_what_the_files_are(
    name: str,
    names: tuple[str, ...],
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, _ = save(BY_NAME[name], save_tiny, tmp_path)
    prompt = make_prompt(8)
    want = driver(path).logits(prompt)
    for quantization in names:
        assert torch.equal(driver(path, quantization=quantization).logits(prompt), want)
    method = BY_NAME[name].config["quant_method"]
    other = "gptq" if method == "awq" else "awq_marlin"
    message = (
        f"--quantization {other} does not fit the checkpoint, which is quantized by '{method}'"
    )
    with pytest.raises(ModelLoadError, match=message) as error:
        driver(path, quantization=other)
    assert "\n" not in str(error.value)


def test_the_flag_does_not_make_files_what_they_are_not(
    save_tiny: Callable[..., Any], driver: Callable[..., Any]
) -> None:
    path, _ = save_tiny("Llama")
    for name in ("awq", "gptq_marlin", "bitsandbytes", "gguf", "hqq"):
        with pytest.raises(ModelLoadError, match=f"{name} does not fit .* is not quantized"):
            driver(path, quantization=name)


def test_a_bias_that_is_not_zero_is_not_dropped(
    save_tiny: Callable[..., Any], driver: Callable[..., Any], tmp_path: Path
) -> None:
    path, _ = save(BY_NAME["gptq-zero-bias"], save_tiny, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][5] = 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"1\.mlp\.up_proj\.bias is not part of this model"):
        driver(path)


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("gptq-desc-act", "quantize_config.json", None),
        ("awq-gemm", "quant_config.json", None),
        ("modelopt-nvfp4", "hf_quant_config.json", "quantization"),
        ("ct-w4-asym", "config.json", "compression_config"),
    ],
)
def test_configs_in_other_places_are_found(
    name: str,
    file: str,
    key: str | None,
    save_tiny: Callable[..., Any],
    driver: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    config = json.loads((path / "config.json").read_text())
    values = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    if file != "config.json":
        del values["quant_method"]
    other = config if file == "config.json" else {}
    (path / file).write_text(json.dumps(other | (values if key is None else {key: values})))
    prompt = make_prompt(20)
    got, want = (driver(p).logits(prompt) for p in (path, twin))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
