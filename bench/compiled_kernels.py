"""Registers, spills and instructions of the step's kernels, compiled for a GPU that is not there.

For comparing two versions of the sampling and attention kernels on any machine with Triton: one
line a kernel and shape, of decoder models' production settings. Run with this folder's parent and
``python`` on PYTHONPATH, and on another checkout's for the other version::

    PYTHONPATH=python python3 bench/compiled_kernels.py --json new.json
    PYTHONPATH=python python3 bench/compiled_kernels.py --before old.json   # what has changed
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from octavo.kernels import slots
from octavo.kernels.gpu import ops as gpu
from octavo.kernels.gpu.all_reduce import add_norm, all_reduce
from octavo.kernels.gpu.peers import make_peers
from octavo.kernels.shared_prefixes import GROUP_FIELDS, MAX_GROUPS
from octavo.kernels.weights import Norm

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
# (query heads, KV heads, elements of a head)
MODELS = {
    "8B": (32, 8, 128),
    "1B": (32, 8, 64),
    "135M": (9, 3, 64),
    "heads of 256": (8, 4, 256),
    "gpt-oss": (64, 8, 64),
}
# Its attention has sinks.
SINKS_IN = "gpt-oss"
VOCABULARIES = (128256, 49152, 32003)
MAX_SEQS = 256


class NoDevice:
    """A Triton driver that knows its target alone: enough to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def figures(kernel: Any) -> dict[str, int]:
    """Figures of ptxas for a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    names = [name for name in INSTRUCTION.findall(code) if name != "NOP"]

    def used(resource: str) -> int:
        found = re.search(rf"{resource}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    return {
        "registers": used("REG"),
        "stack": used("STACK"),
        "shared": kernel.metadata.shared,
        "instructions": len(names),
        "loads": sum(name in ("LDG", "LDGSTS") for name in names),
        "stores": sum(name in ("STG", "ATOMG", "RED") for name in names),
    }


@contextmanager
def compiled(rows: dict[str, dict[str, int]], label: str) -> Iterator[None]:
    """Launches inside compile their kernels and run nothing; adds their figures to ``rows``."""
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any = None, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, **(kwargs | {"warmup": True}))
        rows[f"{self.fn.__name__} {label}"] = figures(kernel)
        return kernel

    JITFunction.run = compile_alone
    try:
        yield
    finally:
        JITFunction.run = run


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def compile_step(rows: dict[str, dict[str, int]]) -> None:
    n, many = MAX_SEQS + 1, 8192
    table = ints(n, slots.RECORD_LEN)
    buffers = gpu.StepBuffers(
        *(ints(many) for _ in range(8)),
        ints(n, 512),
        ints(MAX_GROUPS, GROUP_FIELDS),
        ints(many),
        ints(many),
        slot_table=table,
        sampled_table=table,
    )
    with compiled(rows, ""):
        gpu.prepare_step(ints(many), buffers, decode_rows=8, prefill_reqs=0, prefill_rows=0)


def compile_sampling(rows: dict[str, dict[str, int]], vocab: int) -> None:
    n = MAX_SEQS + 1
    table = ints(n, slots.RECORD_LEN)
    adjusted = gpu.SamplingState(
        table,
        token_counts=torch.zeros(n, vocab, dtype=torch.int16),
        bias_ids=ints(n, 64),
        bias_values=torch.zeros(n, 64),
        bias_until=ints(n, 64),
        allowed_mask=ints(n, -(-vocab // 32)),
    )
    host = gpu.HostIds(ints(3, n), ints(8)[7:])
    for name, state in (("plain", gpu.SamplingState(table)), ("adjusted", adjusted)):
        with compiled(rows, f"V={vocab} {name}"):
            gpu.sample(torch.zeros(8, vocab), ints(8), state, host)


def compile_attention(rows: dict[str, dict[str, int]], model: str) -> None:
    num_heads, num_kv_heads, head_dim = MODELS[model]
    cache = torch.zeros(8, num_kv_heads, 16, head_dim, dtype=torch.bfloat16)
    table, scale = ints(MAX_SEQS + 1, 512), head_dim**-0.5

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    for reqs in (1, 64):
        if reqs <= gpu.max_rope_decodes(head_dim):
            qkv = empty(reqs, (num_heads + 2 * num_kv_heads) * head_dim)
            where = (ints(reqs), cache, cache, table, ints(reqs), ints(reqs))
            with compiled(rows, f"{model} R={reqs} with rotation"):
                gpu.rope_decode_attention(
                    qkv,
                    torch.zeros(1024, head_dim),
                    *where,
                    num_heads=num_heads,
                    scale=scale,
                    sinks=torch.zeros(num_heads) if model == SINKS_IN else None,
                )
    for tokens, reqs in ((1, 1), (64, 64), (16, 8), (256, 8), (4096, 8)):
        lens = (ints(reqs), ints(reqs), ints(reqs + 1))
        with compiled(rows, f"{model} R={reqs} T={tokens}"):
            gpu.paged_attention(
                empty(tokens, num_heads, head_dim),
                cache,
                cache,
                table,
                *lens,
                scale=scale,
                num_decodes=reqs if tokens == reqs else 0,
                max_query_len=tokens,
                max_seq_len=tokens,
                sinks=torch.zeros(num_heads) if model == SINKS_IN else None,
            )


def compile_latent(rows: dict[str, dict[str, int]]) -> None:
    """DeepSeek V3's attention: 128 heads over rows of a rotated key of 64 and a latent of 512."""
    cache = torch.zeros(8, 1, 16, 576, dtype=torch.bfloat16)
    for tokens, reqs in ((1, 1), (64, 64), (4096, 8)):
        lens = (ints(reqs), ints(reqs), ints(reqs + 1))
        with compiled(rows, f"latent R={reqs} T={tokens}"):
            gpu.store_latent(cache.new_zeros(tokens, 576), ints(tokens), cache)
            gpu.latent_attention(
                cache.new_zeros(tokens, 128, 576),
                cache,
                ints(MAX_SEQS + 1, 512),
                *lens,
                scale=192**-0.5,
                value_dim=512,
                num_decodes=0,
                max_query_len=tokens,
                max_seq_len=tokens,
            )


def compile_exchange(rows: dict[str, dict[str, int]]) -> None:
    """Sums between four ranks, of few rows, of many, and of so many that they take two shots."""
    peers = make_peers([torch.device("cpu")] * 4, row_bytes=16384)[0]
    for tokens in (8, 48, 512):
        x = torch.zeros(tokens, 8192, dtype=torch.bfloat16)
        with compiled(rows, f"4 ranks T={tokens}"):
            all_reduce(x, peers).launch()
        with compiled(rows, f"4 ranks T={tokens} normed"):
            add_norm(x, x.clone(), Norm(x[0], 1e-5), peers).launch()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--before", type=Path, help="print what differs from this file")
    args = parser.parse_args()
    triton.runtime.driver.set_active(NoDevice(args.capability))
    triton.knobs.runtime.interpret = True  # the wrappers take tensors of a CPU
    gpu.set_pdl(args.capability >= 90)
    rows: dict[str, dict[str, int]] = {}
    compile_step(rows)
    for vocab in VOCABULARIES:
        compile_sampling(rows, vocab)
    for model in MODELS:
        compile_attention(rows, model)
    compile_latent(rows)
    compile_exchange(rows)
    before = json.loads(args.before.read_text()) if args.before else {}
    for name, row in rows.items():
        old = before.get(name, {})
        cells = [
            f"{key} {old[key]} -> {value}" if old.get(key, value) != value else f"{key} {value}"
            for key, value in row.items()
        ]
        print(f"{name:45}", ", ".join(cells))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
