"""docs/quantization.md: what is read, how it is computed with, and what proves it.

``OCTAVO_WRITE_DOCS=1`` writes it anew, from the cases of the tests and the results of the bench.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from test_schemes_files import CASES, Case, MemoryTensors
from test_tool_files import FOLDER, NAMES

from gguf_blocks import KINDS
from octavo.checkpoints.schemes.registry import REFUSED, find_scheme
from octavo.kernels.cpu.blocks import as_rows, column_order
from octavo.kernels.formats.gguf_grids import GRIDS
from octavo.kernels.weights import Planes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "quantization.md"
RESULTS = ROOT / "bench" / "results" / "perplexity.json"
PRODUCTS = ROOT / "bench" / "results" / "formats_cpu.json"
HERE = "tests/models/test_quantization_page.py"
FILES = "tests/models/test_schemes_files.py"
TOOLS = "tests/models/test_tool_files.py"
# Kinds without integer products: their elements meet float32 activations.
FLOATS = ("FP8", "NF4")


def packed_kind(case: Case) -> str:
    """The kind that a CPU packs a case's projection as, or "dense"."""
    torch.manual_seed(0)
    prefix = "model.layers.0.self_attn.q_proj"
    written = case.write(prefix, torch.randn(64, 384))
    assert written is not None
    named = {f"{prefix}.{suffix}": tensor for suffix, tensor in written[0].items()}
    stored = find_scheme(case.config).linear(MemoryTensors(named, "cpu"), prefix, (64, 384), None)
    assert isinstance(stored, Planes)
    rows = as_rows(stored, column_order(stored))
    return "dense" if rows is None else rows.kind.split("_")[0]


def computed(cases: list[Case]) -> str:
    """How a CPU computes with the files of a row."""
    kinds = dict.fromkeys(packed_kind(case) for case in cases)
    packed = [kind for kind in kinds if kind != "dense"]
    parts = []
    for names, arithmetic in (
        ([k for k in packed if k not in FLOATS], "integer products"),
        ([k for k in packed if k in FLOATS], "float products"),
    ):
        if names:
            parts.append(f"packed as {', '.join(names)}, {arithmetic}")
    if "dense" in kinds:
        dense = [case.name for case in cases if packed_kind(case) == "dense"]
        parts.append(f"dense: {', '.join(dense)}")
    return "; ".join(parts)


def tool_files() -> list[str]:
    by_tool: dict[str, list[str]] = {}
    for name in NAMES:
        with safe_open(FOLDER / f"{name}-logits.safetensors", "pt") as file:
            versions = file.metadata()
        tool = next(key for key in versions if key not in ("torch", "transformers"))
        by_tool.setdefault(f"{tool} {versions[tool]}", []).append(name)
    return [f"| {tool} | {', '.join(names)} |" for tool, names in sorted(by_tool.items())]


def perplexities() -> list[str]:
    results = json.loads(RESULTS.read_text())
    rows = []
    for name, row in results["formats"].items():
        bits = "-" if row["bits_in_file"] is None else f"{row['bits_in_file']:.2f}"
        size = "-" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.0f}"
        speeds = " | ".join(f"{speed:.0f}" for speed in row["tok_s"].values())
        rows.append(
            f"| {name} | {bits} | {row['bits_in_memory']:.2f} | {size} | {speeds} | "
            f"{row['perplexity']:.2f} |"
        )
    return [
        f"`{results['command']}`: {results['machine']}.",
        "",
        "| format | bits, file | bits, memory | file, MB | tok/s, 1 | tok/s, 16 | perplexity |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def caches() -> list[str]:
    """Rows of the types of keys and values."""
    rows = json.loads(RESULTS.read_text())["kv"]
    bits = {"float32": 32, "bfloat16": 16}
    return [
        "| keys and values | bits | tok/s after 8,000 tokens | perplexity |",
        "|---|---|---|---|",
        *(
            # A scale of 32 bits for each head's 64 elements.
            f"| {name} | {bits.get(name, 8.5):.2f} | {_speed(row)} | {row['perplexity']:.2f} |"
            for name, row in rows.items()
        ),
    ]


def _speed(row: dict[str, Any]) -> str:
    """Tokens a second; of a type that no quiet machine was there for: none."""
    return f"{row['tok_s']:.0f}" if "tok_s" in row else "-"


def products() -> list[str]:
    """Rows of one product's time, by format and level."""
    results = json.loads(PRODUCTS.read_text())
    n, k = results["shape"]
    levels = results["levels"]
    rows = []
    for entries in zip(*levels.values(), strict=True):
        assert len({entry["format"] for entry in entries}) == 1
        times = [f"{s * 1e6:.0f}" for entry in entries for s in entry["s"].values()]
        rows.append(f"| {entries[0]['format']} | {entries[0]['bits']:.2f} | {' | '.join(times)} |")
    heads = [f"{rows_of}, {level}" for level in levels for rows_of in ("1 row", "4", "16", "64")]
    return [
        f"Microseconds of one product of {n} x {k} weights with so many rows, by",
        f"`{results['command']}`: {results['machine']}.",
        "",
        f"| format | bits | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
        *rows,
    ]


def quantization_page() -> str:
    rows: dict[str, list[Case]] = {}
    for case in CASES:
        rows.setdefault(case.row, []).append(case)
    table = [
        f"| {row} | {computed(cases)} | see below | "
        f"`{FILES}`: {', '.join(case.name for case in cases)} |"
        for row, cases in rows.items()
    ]
    packed = ", ".join(kind for kind in KINDS if kind not in GRIDS)
    kinds = "`tests/models/test_gguf_kinds.py`, `tests/core/test_gguf.py`"
    gguf = [
        "| gpt-oss's `mxfp4` experts | packed as MXFP4, integer products | dequantized at load | "
        "`tests/models/test_gpt_oss.py` |",
        f"| GGUF {packed} | packed as they are, integer products | see below | {kinds} |",
        f"| GGUF {', '.join(GRIDS)} | dequantized at load | dequantized at load | {kinds} |",
    ]
    refused = [f"| `{method}` | {advice} |" for method, advice in sorted(REFUSED.items())]
    return "\n".join(
        [
            "# Quantized files",
            "",
            f"Written by `OCTAVO_WRITE_DOCS=1 pytest {HERE}`; a test keeps it true.",
            "",
            "| files | on a CPU | on a GPU | proven by |",
            "|---|---|---|---|",
            *table,
            *gguf,
            "",
            "Each case is a tiny random model written in that layout by hand: logits within 1e-3 in",
            "float32 of the model of its dequantized weights, on the plain PyTorch ops and on the CPU",
            "kernels, and greedy tokens equal. GGUF's kinds are held to llama.cpp's own package, block",
            "by block. No file needs the package that made it.",
            "",
            "- A CPU keeps the numbers of the file in about its size, whatever `--dtype` says (but GGUF's",
            "  are rounded to bfloat16 or float16, where one of these is asked for). Weights whose groups",
            "  are no whole blocks of 16 or 32 columns are dense, in the type that",
            "  `--dtype` gives dense ones (bfloat16 where a CPU keeps each in its file's), and so are",
            "  parts of a fused layer in another activation order than its first.",
            "- Integer products round activations to two int8 parts (12 bits or more); `--dtype float32`",
            "  leaves them float32 everywhere.",
            "- On a GPU, in bfloat16 and float16, these stay as they are: integers of 4 bits whose groups",
            "  are a multiple of 16 columns (desc_act too, where q, k and v share one order); e4m3 with",
            "  scales by tensor, by row or by block of 128 x 128; integers of 8 bits without zero points,",
            "  by row or in such groups; 4-bit floats (MXFP4, NVFP4) and codes of a table (bitsandbytes' nf4",
            "  and fp4, the table rounded to 16 bits); GGUF's Q4_0, Q4_1, Q4_K and Q8_0; experts of these but",
            "  integers of 8 bits and codes. Others, parts of a fused layer that disagree and what `--dtype",
            "  float32` loads are dequantized there.",
            "  `tests/models/test_quantized_gpu.py` has each layout, and compares whole models (`-m gpu`).",
            "- W8A8 and FP8 files are computed with as weights of 8 bits, but for a GPU's steps of more",
            "  than 16 rows with e4m3 weights whose scales are not of blocks: there each row of",
            "  activations is rounded to e4m3. Input scales are left unread.",
            "- Static scales of keys and values (`k_scale`, `v_scale`, `output_scale`, `kv_scale`; one, or",
            "  one a head) are those of a cache of `--kv-cache-dtype fp8` or `fp8_e4m3`, which a GPU has by",
            "  itself where the config says so (`kv_cache_scheme`, `kv_cache_quant_algo`). Otherwise, and of",
            "  `fp8_per_token_head`, `fp8_e5m2` and `int8`, each row's scale is computed as it is stored; a line",
            "  in the log says that the file's are not used. Families with an attention of their own compute",
            "  them, too. `tests/models/test_kv_scales.py`, `tests/kernels/test_cpu_kv_cache.py`.",
            "- `-q fp8` (also `fp8_per_channel`: a scale a row), `fp8_per_tensor`, `fp8_per_block`, `mxfp4`, `w4`",
            "  and `w8` round a checkpoint's float matrices as they are read, one at a time, on a CPU and on a",
            "  GPU. `w4` and `w8` are GGUF's Q4_1 and Q8_0 on a CPU, groups of 128 on a GPU.",
            "- Dequantized on a GPU on purpose: 8 bits with zero points, which would need an argument more in",
            "  the kernels of what most files are.",
            "- The tensors stored for a module decide whether it is quantized, so that the parts of a",
            "  fused layer may be of several formats. Lists of modules left out",
            "  (`modules_to_not_convert`, `ignored_layers`) only repeat that; compressed-tensors' `ignore`",
            "  and `targets` are matched as its library does, by name, by regex after `re:`, by class",
            "  name. A quantized output head is used where the config ties it to the embedding.",
            "- `--quantization` may name what the files are (`awq`, `awq_marlin`, `gptq_marlin`, ...);",
            "  another name than theirs is refused.",
            "- Decoders that run through transformers' own module are refused quantized.",
            "",
            "## Files of the formats' own tools",
            "",
            "Logits within 1e-3 in float32 of what the tool itself reads from its file, and its greedy",
            f"tokens (`{TOOLS}`; `tests/models/make_tool_files.py` makes them anew):",
            "",
            "| made by | files |",
            "|---|---|",
            *tool_files(),
            "",
            "## What each costs",
            "",
            "SmolLM2-135M, its projections rounded to the nearest numbers of each format: a tool that",
            "calibrates loses less. The model there is was rounded to Q4_1 before, which therefore",
            "loses nothing more.",
            "",
            *perplexities(),
            "",
            "Keys and values, with the model's own weights (`--kv-cache-dtype`), on the same machine:",
            "",
            *caches(),
            "",
            *products(),
            "",
            "## Refused, by `quant_method`",
            "",
            "| method | way out |",
            "|---|---|",
            *refused,
            "",
        ]
    )


def test_the_page_is_what_is_proven() -> None:
    page = quantization_page()
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        DOCS.write_text(page)
    assert page == DOCS.read_text(), "OCTAVO_WRITE_DOCS=1 writes it anew"
