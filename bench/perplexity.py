"""SmolLM2-135M requantized in each format, and with each KV cache: bits, speed and perplexity.

    python bench/perplexity.py MODEL.gguf --threads 2 --json perplexity.json
    python bench/perplexity.py MODEL.gguf --only 'GPTQ|AWQ' --json perplexity.json  # these rows
    python bench/perplexity.py MODEL.gguf --kv --json perplexity.json

Rounds the float weights of a model's projections to the nearest numbers of each format (what tools
choose better than that is theirs), writes them as the format's files, and serves those as a CPU
does by default. Perplexity: of this repository's documents, in parts of 512 tokens. Speed: output
tokens a second at 1 and 16 requests of 64 tokens in, 32 out; rounds take the formats in turn, and
the table has medians. ``--rounds 0`` leaves out speeds and ``--speeds`` all else, which then stays
as the JSON has it: speeds of a few rows at a time need a quiet machine for a minute. ``--kv``: the
model's own file with each type of keys and values, whose speed is that of one request's tokens
after KV_CONTEXT others. Bits: of a projection's element in the file and in memory; the embedding,
which is the output head as well, stays as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.checkpoints.gguf import GgufWeights
from octavo.config import EngineConfig
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.cpu.blocks import NF4
from octavo.kernels.cpu.linear import CpuWeight
from octavo.llm import LLM
from octavo.models.source import ModelSource
from octavo.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "docs/agents.md", "docs/api.md")
PART, PARTS = 512, 6
BATCHES = (1, 16)
KV_TYPES = ("float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2")
KV_CONTEXT, KV_OUT = 8000, 32
NUM_IN, NUM_OUT = 64, 32
# A weight of as many rows is no projection.
VOCABULARY = 40_000
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

# A float weight [N, K] -> the tensors that stand for it, by suffix.
Writer = Callable[[Tensor], dict[str, Tensor]]


def words(q: Tensor, bits: int) -> Tensor:
    """Integers [R, C] from 0 on as int32 [R, C bits / 32], from the lowest bit on."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int64) * bits
    packed = (q.long().view(q.shape[0], -1, per_word) << shifts).sum(2)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def affine(weight: Tensor, bits: int, size: int, *, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(q [N, K] from 0 on, scale [N, G] float16, zero [N, G]) of groups of ``size`` columns."""
    n, k = weight.shape
    groups = weight.view(n, k // size, size)
    top = 2**bits - 1
    if sym:
        scale = groups.abs().amax(2) * 2 / top
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    scale = scale.half()
    q = (groups / scale.float()[:, :, None] + zero[:, :, None]).round().clamp(0, top)
    return q.view(n, k), scale, zero


def packed_ints(bits: int, size: int | None) -> Writer:
    def write(weight: Tensor) -> dict[str, Tensor]:
        q, scale, _ = affine(weight, bits, size or weight.shape[1], sym=True)
        shape = torch.tensor(weight.shape)
        return {"weight_packed": words(q, bits), "weight_scale": scale, "weight_shape": shape}

    return write


def awq(weight: Tensor) -> dict[str, Tensor]:
    q, scale, zero = affine(weight, 4, 64, sym=False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def columns(values: Tensor) -> Tensor:
        rows = values.t()
        return words(rows.reshape(rows.shape[0], -1, 8)[:, :, order].flatten(1), 4)

    return {"qweight": columns(q), "qzeros": columns(zero), "scales": scale.t().contiguous()}


def gptq(bits: int, *, sym: bool = True) -> Writer:
    def write(weight: Tensor) -> dict[str, Tensor]:
        q, scale, zero = affine(weight, bits, 64, sym=sym)
        return {
            "qweight": words(q, bits).t().contiguous(),
            "qzeros": words((zero.t() - 1) % 2**bits, bits),
            "scales": scale.t().contiguous(),
        }

    return write


def fp8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_tensor(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 128, 0, -n % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    return {"weight": (weight / each).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def nearest(values: Tensor, codes: Tensor) -> Tensor:
    order = codes.argsort(stable=True)
    middles = (codes[order][1:] + codes[order][:-1]) / 2
    return order[torch.bucketize(values, middles)].to(torch.uint8)


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    groups = weight.view(n, -1, 16)
    factor = 448 * 6 / weight.abs().max()
    scale = (groups.abs().amax(2) / 6 * factor).to(torch.float8_e4m3fn)
    q = nearest((groups / (scale.float() / factor)[:, :, None]).view(n, k), E2M1)
    pairs = q[:, ::2] | q[:, 1::2] << 4
    return {"weight_packed": pairs, "weight_scale": scale, "weight_global_scale": factor.view(1)}


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    n, k = weight.shape
    groups = weight.view(n, -1, 32)
    # The largest of a group, at most 6, lies between 4 and 8 of its power of two.
    exponent = groups.abs().amax(2).log2().floor() - 2
    q = nearest((groups / torch.exp2(exponent)[:, :, None]).view(n, k).clamp(-6, 6), E2M1)
    scale = (exponent + 127).to(torch.uint8)
    return {"weight_packed": q[:, ::2] | q[:, 1::2] << 4, "weight_scale": scale}


def bnb4(kind: str, codes: Tensor) -> Writer:
    def write(weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.view(-1, 64)
        absmax = blocks.abs().amax(1)
        q = nearest((blocks / absmax[:, None]).view(-1), codes)
        state = {"blocksize": 64, "shape": list(weight.shape), "dtype": "float32"}
        data = json.dumps(state | {"quant_type": kind}).encode()
        return {
            "weight": (q[::2] << 4 | q[1::2])[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": codes.clone(),
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(data)).byte(),
        }

    return write


def bnb8(weight: Tensor) -> dict[str, Tensor]:
    absmax = weight.abs().amax(1)
    q = (weight / absmax[:, None] * 127).round().to(torch.int8)
    return {"weight": q, "SCB": absmax, "weight_format": torch.zeros((), dtype=torch.uint8)}


def int8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def ct(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


# bitsandbytes' fp4: a sign, two bits of exponent, one of mantissa, in an order of its own.
BNB_FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
GPTQ = {"quant_method": "gptq", "group_size": 64, "desc_act": False, "sym": True}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ROW = {"strategy": "channel"}
# A format -> its quantization_config and writer, None: the float weights; and --quantization.
FORMATS: dict[str, tuple[Mapping[str, Any] | None, Writer | None, str | None]] = {
    "bfloat16": (None, None, None),
    "GGUF Q8_0 (`-q w8`)": (None, None, "w8"),
    "GPTQ 8 bits, groups of 64": (GPTQ | {"bits": 8}, gptq(8), None),
    "compressed-tensors W8A16, a row": (
        ct("pack-quantized", num_bits=8, type="int", **ROW),
        packed_ints(8, None),
        None,
    ),
    "compressed-tensors int8, a row": (
        ct("int-quantized", num_bits=8, type="int", **ROW),
        int8_rows,
        None,
    ),
    "compressed-tensors FP8, a row": (
        ct("float-quantized", num_bits=8, type="float", **ROW),
        fp8_rows,
        None,
    ),
    "FP8, a tensor": ({"quant_method": "fp8"}, fp8_tensor, None),
    "FP8, blocks of 128 x 128": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        fp8_blocks,
        None,
    ),
    "`-q fp8`": (None, None, "fp8"),
    "`-q fp8_per_tensor`": (None, None, "fp8_per_tensor"),
    "`-q fp8_per_block`": (None, None, "fp8_per_block"),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8, None),
    "GGUF Q4_1 (`-q w4`)": (None, None, "w4"),
    "AWQ, groups of 64": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        awq,
        None,
    ),
    "GPTQ 4 bits, groups of 64": (GPTQ | {"bits": 4}, gptq(4), None),
    "GPTQ 4 bits, asymmetric": (GPTQ | {"bits": 4, "sym": False}, gptq(4, sym=False), None),
    "compressed-tensors W4A16, groups of 32": (
        ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        packed_ints(4, 32),
        None,
    ),
    "compressed-tensors NVFP4": (
        ct(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        nvfp4,
        None,
    ),
    "compressed-tensors MXFP4": (
        ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4,
        None,
    ),
    "`-q mxfp4`": (None, None, "mxfp4"),
    "bitsandbytes nf4": (BNB4, bnb4("nf4", torch.tensor(NF4)), None),
    "bitsandbytes fp4": (BNB4, bnb4("fp4", BNB_FP4), None),
}


def float_tensors(model: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and bfloat16 tensors of a Llama in a GGUF file, tied as it is."""
    source = ModelSource("gguf", model, "model", EngineConfig(model=str(model)))
    shape, file = source.model_config, source.gguf
    assert file is not None
    weights = GgufWeights(
        file,
        heads=(shape.num_heads, shape.num_kv_heads),
        device=torch.device("cpu"),
        dtype=torch.float32,
        act_dtype=torch.float32,
        packed=False,
    )
    d, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, size: tuple[int, int]) -> None:
        found = weights.linear(name, size)
        assert isinstance(found, Tensor)
        tensors[f"{name}.weight"] = found.bfloat16()

    matrix("model.embed_tokens", (shape.vocab_size, d))
    norms = ["model.norm"]
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        for name, size in shapes.items():
            matrix(f"{prefix}.{name}", size)
    for name in norms:
        tensors[f"{name}.weight"] = weights.vector(f"{name}.weight", d)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope.theta,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return config, tensors


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    quantization: Mapping[str, Any] | None,
    write: Writer | None,
) -> float:
    """Files of a format; bits of a projection's element in them."""
    out, nbytes, elements = {}, 0, 0
    for name, tensor in tensors.items():
        if "_proj" not in name:
            out[name] = tensor
            continue
        prefix = name.removesuffix(".weight")
        made = {"weight": tensor} if write is None else write(tensor.float())
        out |= {f"{prefix}.{suffix}": value.contiguous() for suffix, value in made.items()}
        nbytes += sum(value.nbytes for value in made.values())
        elements += tensor.numel()
    folder.mkdir()
    save_file(out, folder / "model.safetensors")
    values = config if quantization is None else config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(values))
    return 8 * nbytes / elements


def perplexity(llm: LLM, ids: list[int]) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    loss, count = 0.0, 0
    for start in range(0, PARTS * PART, PART):
        part = ids[start : start + PART]
        [output] = llm.generate([{"prompt_token_ids": part}], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        for token, entry in zip(part[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            loss -= entry[token].logprob
            count += 1
    return math.exp(loss / count)


def tokens_a_second(llm: LLM, requests: int, seed: int) -> float:
    rng = random.Random(1000 * seed + requests)
    prompts = [
        {"prompt_token_ids": [rng.randrange(100, 30_000) for _ in range(NUM_IN)]}
        for _ in range(requests)
    ]
    params = SamplingParams(temperature=0, max_tokens=NUM_OUT, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return requests * NUM_OUT / (time.perf_counter() - start)


def packed_weights() -> list[CpuWeight]:
    """All projections of the models that are loaded."""
    found = (weight for weight in gc.get_objects() if isinstance(weight, CpuWeight))
    return [weight for weight in found if weight.shape[0] < VOCABULARY]


def measure_formats(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A row of each format that is asked for."""
    config, tensors = float_tensors(args.model)
    rows: dict[str, dict[str, Any]] = {}
    llms: dict[str, LLM] = {}
    asked = {name: values for name, values in FORMATS.items() if re.search(args.only, name)}
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, (quantization, write, flag)) in enumerate(asked.items()):
            folder = Path(temporary) / str(i)
            bits = write_folder(folder, config, tensors, quantization, write)
            size = sum(file.stat().st_size for file in folder.iterdir())
            before = {id(weight) for weight in packed_weights()}
            llm = LLM(
                str(folder),
                tokenizer=str(args.model),
                quantization=flag,
                max_model_len=576,
                kv_cache_memory_bytes=64 << 20,
                threads=args.threads,
            )
            own = [weight for weight in packed_weights() if id(weight) not in before]
            memory = 8 * sum(w.nbytes for w in own) / sum(w.num_elements for w in own)
            rows[name] = {
                "bits_in_file": None if flag else bits,
                "bits_in_memory": memory,
                "file_bytes": None if flag else size,
            }
            if not args.speeds:
                rows[name]["perplexity"] = perplexity(llm, text_ids(llm))
            llms[name] = llm
            print(name, rows[name], flush=True)
            (folder / "model.safetensors").unlink()
    speeds = {name: {batch: list[float]() for batch in BATCHES} for name in llms}
    for seed in range(args.rounds):
        for batch in BATCHES:
            for name, llm in llms.items():
                speeds[name][batch].append(tokens_a_second(llm, batch, seed))
    if args.rounds:
        for name, row in rows.items():
            row["tok_s"] = {str(n): statistics.median(found) for n, found in speeds[name].items()}
    return rows


def measure_kv(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A row of each type of keys and values."""
    rows: dict[str, dict[str, Any]] = {}
    for dtype in filter(re.compile(args.only).search, KV_TYPES):
        llm = LLM(
            str(args.model),
            kv_cache_dtype=dtype,
            max_model_len=KV_CONTEXT + KV_OUT,
            num_gpu_blocks_override=520,
            threads=args.threads,
        )
        ids = text_ids(llm)
        rows[dtype] = {} if args.speeds else {"perplexity": perplexity(llm, ids)}
        if args.rounds:
            prompt = {"prompt_token_ids": (ids * 4)[:KV_CONTEXT]}
            params = SamplingParams(temperature=0, max_tokens=KV_OUT, ignore_eos=True)
            found = []
            for _ in range(args.rounds + 1):
                start = time.perf_counter()
                llm.generate([prompt], params, use_tqdm=False)
                found.append(KV_OUT / (time.perf_counter() - start))
            # The first has filled the cache, which the others find.
            rows[dtype]["tok_s"] = statistics.median(found[1:])
        print(dtype, rows[dtype], flush=True)
        del llm
        gc.collect()
    return rows


def text_ids(llm: LLM) -> list[int]:
    """The tokens of this repository's documents."""
    text = "\n".join((ROOT / name).read_text() for name in TEXTS)
    ids: list[int] = llm.get_tokenizer().encode(text)
    assert len(ids) >= PARTS * PART, len(ids)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speeds", action="store_true", help="no perplexity")
    parser.add_argument("--only", default="", help="a regex of the rows' names")
    parser.add_argument("--kv", action="store_true", help="types of keys and values, no formats")
    parser.add_argument("--json", type=Path, help="the rows that it has stay, or are replaced")
    args = parser.parse_args()
    part, order = ("kv", list(KV_TYPES)) if args.kv else ("formats", list(FORMATS))
    rows = measure_kv(args) if args.kv else measure_formats(args)
    if args.json is None:
        print(json.dumps(rows, indent=1))
        return
    out = json.loads(args.json.read_text()) if args.json.exists() else {"formats": {}}
    merged: dict[str, dict[str, Any]] = out.get(part, {})
    for name, row in rows.items():
        merged[name] = merged.get(name, {}) | row
    out[part] = {name: merged[name] for name in order if name in merged}
    if args.rounds:
        out["command"] = f"bench/perplexity.py {args.model.name} --threads {args.threads}"
        out["machine"] = (
            f"{processor()}, {cpu.num_threads()} threads, level {cpu.level()}, "
            f"torch {torch.__version__}, medians of {args.rounds} rounds"
        )
    args.json.write_text(json.dumps(out, indent=1) + "\n")


def processor() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "an unnamed processor")


if __name__ == "__main__":
    main()
