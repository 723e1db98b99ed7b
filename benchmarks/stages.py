"""Measure the CPU time of each stage from text to batches, in seconds per GB of text on one core.

    python -m benchmarks.stages                        # 200 MB, 3 rounds
    python -m benchmarks.stages --json benchmarks/results/stages.json

Each measurement is a separate process and starts after the imports. A round runs every stage once, and
ratios are taken within a round. CPU seconds are summed over all threads and leave out waiting for a disk
or a network. Publish and fetch use fsspec's file system in memory. So they include checksums, files and
syncs, but no network encryption. docs/scaling.md uses the table.
"""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import median, options, ratios, report, run_rounds, three
from benchmarks.tokenize import make_text
from lit_gptdata._io import sha256_file
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.remote.store import prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.steps import Steps

STAGES = ("build-tiktoken", "build", "hash", "publish", "build-at-url", "fetch", "batches")
BASELINE = "build-tiktoken"
LENGTH, BATCH_SIZE = 1024, 8


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(stage: str, folder: Path) -> dict[str, float]:
    """Run one stage in this process: CPU seconds per GB of text."""
    files = sorted((folder / "text").glob("*"))
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    tokenizer, corpus = Tokenizer("gpt2"), FilesCorpus(files)
    tokenizer.reference.encoding  # noqa: B018 loaded before the clock starts
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if stage in ("publish", "fetch", "batches"):
            store = find_store(corpus, tokenizer, folder / "tokens")
            assert store is not None
        if stage == "fetch":
            url = publish(store, "memory://tokens")
        start = cpu_s()
        if stage.startswith("build"):
            engine = "tiktoken" if stage == "build-tiktoken" else "auto"
            prepare_store(corpus, tokenizer, Path(scratch), BuildOptions(engine=engine, workers=1))
        elif stage == "hash":
            for path in files:
                sha256_file(path)
        elif stage == "build-at-url":
            publish_text(corpus, tokenizer, "memory://tokens")
        elif stage == "publish":
            publish(store, "memory://tokens")
        elif stage == "fetch":
            _touch_shards(prepare_store_at(url, Cache(Path(scratch), None)))
        elif stage == "batches":
            _load_epoch(store)
        return {"cpu_s_per_gb": (cpu_s() - start) / gigabytes}


def _touch_shards(store: TokenStore) -> None:
    """Read one token of every shard, so that all shards are fetched."""
    ends = np.cumsum([shard.n_tokens for shard in store.shards])
    store.tokens.gather(np.array([0, *ends[:-1]]), 1)


def _load_epoch(store: TokenStore) -> None:
    windows = Windows(store.tokens, begin=0, end=store.n_tokens, max_length=LENGTH, stride=LENGTH)
    for _ in window_loader(windows, Steps(n=len(windows), batch_size=BATCH_SIZE), seed=0):
        pass


def main() -> None:
    parser = options(__doc__ or "", rounds=3)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--measure", help="measure one stage in this process")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        files = make_text(folder / "text", args.megabytes, files=1)
        store = prepare_store(
            FilesCorpus(files), Tokenizer("gpt2"), folder / "tokens", BuildOptions(workers=None)
        )
        n_bytes = sum(path.stat().st_size for path in store.path.iterdir())
        rounds = run_rounds("benchmarks.stages", STAGES, args.rounds, folder)
    key = "cpu_s_per_gb"
    rows = [
        [stage, three(median(rounds, stage, key)), *ratios(rounds, stage, key, BASELINE)]
        for stage in STAGES
    ]
    note = (
        f"{store.n_bytes / store.n_tokens:.2f} bytes of text per token, {n_bytes / store.n_bytes:.2f} "
        "bytes on disk per byte of text"
    )
    report(
        f"{args.megabytes} MB of text, gpt2; medians of {args.rounds} rounds; batches of "
        f"({BATCH_SIZE}, {LENGTH})",
        ["stage", "CPU s per GB of text", f"{BASELINE} ÷ stage", "lowest – highest"],
        rows,
        measured=rounds,
        notes=[note],
        to=args.json,
    )


if __name__ == "__main__":
    main()
