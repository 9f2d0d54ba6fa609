"""Speed of weights on their way to the device, beside the disk's own.

    python bench/load.py FOLDER [--size 16g] [--device cuda] [--repeat 3] [--keep]

Writes a checkpoint of Llama-3.1-8B's shapes (as many layers as fit ``--size``) into FOLDER as
bfloat16 shards, then reads it alternately with plain reads of one thread, with the loader's readers
alone and with octavo's loader, each time with the page cache dropped where the system lets it. One
line for each run, and the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo.checkpoints.read_ahead import ReadAhead
from octavo.checkpoints.safetensors import read_entries
from octavo.config import EngineConfig
from octavo.layers.ops import get_ops
from octavo.models.source import resolve_model
from octavo.runner import loading

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b" / "config.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# The size of one plain read: large enough that the calls cost nothing.
READ_BYTES = 16 << 20
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def parse_size(text: str) -> int:
    """Bytes: a number with k, m or g (decimal) behind it, or none."""
    factor = UNITS.get(text[-1:].lower(), 1)
    return int(float(text[:-1] if factor > 1 else text) * factor)


def shapes(config: dict[str, int], num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama checkpoint."""
    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", (vocab, d)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (d,)
        yield f"{prefix}.self_attn.q_proj.weight", (q, d)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, d)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, d)
        yield f"{prefix}.self_attn.o_proj.weight", (d, q)
        yield f"{prefix}.post_attention_layernorm.weight", (d,)
        yield f"{prefix}.mlp.gate_proj.weight", (f, d)
        yield f"{prefix}.mlp.up_proj.weight", (f, d)
        yield f"{prefix}.mlp.down_proj.weight", (d, f)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocab, d)


def write_checkpoint(folder: Path, size: int) -> list[Path]:
    """Shards of about ``size`` bytes in all, an index and a config.json; the shards."""
    config = json.loads(CONFIG.read_text())

    def nbytes(num_layers: int) -> int:
        return sum(2 * torch.Size(s).numel() for _, s in shapes(config, num_layers))

    while nbytes(1) > size:  # a trial on a small disk
        config["vocab_size"] //= 2
        config["intermediate_size"] = max(256, config["intermediate_size"] // 2)
        if config["vocab_size"] < 512:
            raise SystemExit("--size is too small for one layer")
    per_layer = nbytes(2) - nbytes(1)
    num_layers = min(config["num_hidden_layers"], 1 + round((size - nbytes(1)) / per_layer))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config))
    # Bytes that no file system can compress or share, made once.
    pattern = torch.randint(-(2**15), 2**15, (1 << 26,), dtype=torch.int16)
    # Exponents small enough for finite numbers.
    pattern &= -0x4001
    pattern = pattern.view(torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    files: list[Path] = []
    filled = 0

    def flush() -> None:
        nonlocal filled
        file = folder / f"model-{len(files) + 1:05}.safetensors"
        save_file(shards[0], file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[0], file.name))
        files.append(file)
        shards[0], filled = {}, 0

    for name, shape in shapes(config, num_layers):
        count = torch.Size(shape).numel()
        repeats = -(-count // pattern.numel())
        tensor = pattern.repeat(repeats)[:count].clone().view(shape)
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            flush()
        shards[0][name] = tensor
        filled += tensor.nbytes
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return files


def drop_page_cache(files: list[Path]) -> str:
    """Forget the files' pages; how."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return "dropped for the whole system"
    except OSError:
        if not hasattr(os, "posix_fadvise"):
            return "kept"
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "dropped for these files, as far as the system takes the advice"


def read_plainly(files: list[Path]) -> None:
    """Every byte once, into one buffer."""
    buffer = bytearray(READ_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def read_ahead(files: list[Path], device: torch.device) -> None:
    """As the loader reads them, with nobody who makes a model of them."""
    with ReadAhead(files, device) as ahead:
        for file in files:
            for entry in read_entries(file):
                ahead.take(file, entry.name)


def load(folder: Path, device: torch.device) -> None:
    """As the engine does it, from config.json to weights on the device."""
    config = EngineConfig(model=str(folder), device=device.type, max_model_len=1024)  # type: ignore[arg-type]
    model = loading.load(config, resolve_model(config))
    if device.type == "cuda":
        torch.cuda.synchronize()
    del model


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=parse_size, default=parse_size("16g"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the files, or use those there")
    args = parser.parse_args()
    device = torch.device(args.device)
    files = sorted(args.folder.glob("model-*.safetensors")) if args.keep else []
    if not files:
        start = time.perf_counter()
        files = write_checkpoint(args.folder, args.size)
        print(f"written in {time.perf_counter() - start:.1f} s", flush=True)
    total = sum(file.stat().st_size for file in files)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is not part of loading,
    get_ops(device, "auto")  # nor are imports
    print(f"{total / 1e9:.2f} GB in {len(files)} files, device {device}")
    names = ("plain read", "read ahead alone", "octavo", "octavo, cached")
    rates: dict[str, list[float]] = {name: [] for name in names}
    how = ""
    for _ in range(args.repeat):
        how = drop_page_cache(files)
        rates["plain read"].append(total / 1e9 / timed(lambda: read_plainly(files)))
        drop_page_cache(files)
        rates["read ahead alone"].append(total / 1e9 / timed(lambda: read_ahead(files, device)))
        drop_page_cache(files)
        rates["octavo"].append(total / 1e9 / timed(lambda: load(args.folder, device)))
        rates["octavo, cached"].append(total / 1e9 / timed(lambda: load(args.folder, device)))
        print({name: f"{runs[-1]:.2f} GB/s" for name, runs in rates.items()}, flush=True)
    print(f"page cache: {how}")
    for name, runs in rates.items():
        print(f"{name}: {statistics.median(runs):.2f} GB/s (median of {len(runs)})")
    if not args.keep:
        for name in [*files, args.folder / "config.json", args.folder / INDEX]:
            name.unlink()


if __name__ == "__main__":
    main()
