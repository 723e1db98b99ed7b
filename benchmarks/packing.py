"""Pack documents into windows: padding against other methods, and the cost of the index.

    python -m benchmarks.packing                       # padding of 100,000 documents, in seconds
    python -m benchmarks.packing --index 10000000      # the index of 10 million documents
    python -m benchmarks.packing --batches             # batches of each kind of windows
    python -m benchmarks.packing --json benchmarks/results/packing.json

Document lengths are log-normal, with a median of 300 tokens and sigma 1.2. Each method gets the same
documents, which have one separator each, and puts them into windows of `--lengths` positions:

    best-fit       the index of `windows=packed`
    first-fit      first-fit decreasing of the same rests: each goes into the first window with space
    crop           as nanochat does it: a row takes the longest of 1,000 buffered documents that fits;
                   if none fits, the shortest fills the row, and what exceeds the row is lost
    concatenate    documents one after the other, cut into windows, as `windows=sliding` has them

The index is built from a store that has documents but no ids. Each build is a separate process. Memory
is its peak, with the memory before the build in parentheses.

A batch is (32, 256), shuffled, without workers. The kinds of windows take turns of 200 batches in one
process, and a round is a turn of each. The time is CPU time, because it varies less on a busy machine.
"""

from __future__ import annotations

import argparse
import bisect
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.loader import epochs
from benchmarks.measure import RandomTokens, Round, median, options, ratios, report, run_rounds, three
from lit_gptdata import GPTDataModule
from lit_gptdata.tokens.shards import ROW
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.windows.packing import WindowIndex, build_index, open_index

BASELINE = "best-fit"
BUFFER = 1_000  # documents that nanochat's loader chooses from
SHARD_DOCUMENTS = 1 << 17
LENGTH = 1_024  # positions of a window in the index

Packed = tuple[int, int, int]  # windows, positions that are not padding, documents that are cut
Method = Callable[[np.ndarray, int], Packed]


def document_lengths(n: int, seed: int) -> np.ndarray:
    """Tokens of each document, without its separator."""
    return np.random.default_rng(seed).lognormal(np.log(300), 1.2, n).astype(np.int64)


def best_fit(positions: np.ndarray, length: int) -> Packed:
    ends = np.cumsum(positions)
    block = build_index(ends - positions, ends - 1, length, "packed")
    return len(block.firsts), int(block.lengths.sum()), int((positions > length).sum())


def first_fit(positions: np.ndarray, length: int) -> Packed:
    """First-fit decreasing with a tree over windows: each node has the largest space below it."""
    n_full, rests = np.divmod(positions - 1, length)
    size = 1 << len(positions).bit_length()
    tree, n_windows = [length] * (2 * size), 0
    for rest in np.sort(rests + 1)[::-1].tolist():
        node = 1
        while node < size:
            node = 2 * node if tree[2 * node] >= rest else 2 * node + 1
        n_windows = max(n_windows, node - size + 1)
        tree[node] -= rest
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return n_windows + int(n_full.sum()), int(positions.sum()), int((positions > length).sum())


def crop(positions: np.ndarray, length: int) -> Packed:
    waiting = iter(positions.tolist())
    buffer = sorted(next(waiting) for _ in range(min(BUFFER, len(positions))))
    n_windows = kept = n_cut = space = 0
    while buffer:
        if not space:
            space, n_windows = length, n_windows + 1
        fitting = bisect.bisect_right(buffer, space)
        document = buffer.pop(max(0, fitting - 1))
        n_cut += document > space
        kept += min(document, space)
        space -= min(document, space)
        if (following := next(waiting, None)) is not None:
            bisect.insort(buffer, following)
    return n_windows, kept, n_cut


def concatenate(positions: np.ndarray, length: int) -> Packed:
    ends = np.cumsum(positions)
    n_cut = ((ends - 1) // length > (ends - positions) // length).sum()
    return -(-int(ends[-1]) // length), int(ends[-1]), int(n_cut)


METHODS: dict[str, Method] = {
    BASELINE: best_fit,
    "first-fit": first_fit,
    "crop": crop,
    "concatenate": concatenate,
}


def padding(lengths: list[int], n_documents: int, seed: int) -> Round:
    """The results of each method for each length of a window."""
    positions, results = document_lengths(n_documents, seed) + 1, {}
    for length in lengths:
        for name, method in METHODS.items():
            start = time.process_time()
            n_windows, kept, n_cut = method(positions, length)
            seconds = time.process_time() - start
            results[f"{length} {name}"] = {
                "seconds": seconds, "windows": n_windows, "padding": 1 - kept / (n_windows * length),
                "lost": 1 - kept / int(positions.sum()), "cut": n_cut / n_documents,
            }  # fmt: skip
    return results


class IndexOfDocuments:
    """The index of a store without ids, as `open_index` reads it, one shard at a time."""

    fingerprint = "benchmark"
    document_rows: Any = TokenStore.document_rows

    def __init__(self, n_documents: int, folder: Path) -> None:
        self.n_documents, self.n_tokens, self.folder = n_documents, 0, folder
        self.shards, self._begins = [], []
        self.vocab = {"n_bytes": np.zeros(1)}
        for begin in range(0, n_documents, SHARD_DOCUMENTS):
            n = min(SHARD_DOCUMENTS, n_documents - begin)
            lengths = document_lengths(n, begin) + 1
            rows = np.zeros(n, ROW)
            rows["token"], rows["document"] = np.cumsum(lengths) - lengths, 1
            rows.tofile(folder / f"{len(self.shards)}.idx")
            self.shards.append(SimpleNamespace(n_tokens=int(lengths.sum())))
            self._begins.append(self.n_tokens)
            self.n_tokens += int(lengths.sum())
        self.n_tokens -= 1  # no separator after the last document
        self.shards[-1].n_tokens -= 1

    @property
    def tokens(self) -> Any:
        return SimpleNamespace(gather=lambda starts, length: np.zeros((len(starts), length), np.int64))

    def rows(self, shard: int) -> np.ndarray:
        rows = np.fromfile(self.folder / f"{shard}.idx", ROW)
        rows["token"] += self._begins[shard]
        return rows


def measure(kind: Any, n_documents: int) -> dict[str, float]:
    """Build and open an index in this process."""
    with tempfile.TemporaryDirectory() as folder:
        store: Any = IndexOfDocuments(n_documents, Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        index = open_index(store, 0, store.n_tokens, LENGTH, kind, Path(folder) / "windows")
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        opening = []
        for _ in range(21):
            start = time.perf_counter()
            WindowIndex(index.folder)
            opening.append(time.perf_counter() - start)
        n_bytes = sum(path.stat().st_size for path in index.folder.iterdir())
        times = [usage.ru_utime + usage.ru_stime for usage in (before, after)]
        return {
            "seconds": seconds, "CPU seconds": times[1] - times[0], "MB": after.ru_maxrss / 1e3,
            "MB before": before.ru_maxrss / 1e3, "bytes": n_bytes / index.n_documents,
            "open ms": 1e3 * statistics.median(opening),
            "padding": 1 - index.n_targets / (index.n_windows * LENGTH),
        }  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.{4 if 0 < share < 0.001 else 1}f} %"


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--index", type=int, metavar="DOCUMENTS", help="measure the index instead")
    parser.add_argument("--batches", action="store_true", help="measure batches instead")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.index)))
    elif args.index:
        report_index(args)
    elif args.batches:
        report_batches(args)
    else:
        report_padding(args)


def report_padding(args: argparse.Namespace) -> None:
    rounds = [padding(args.lengths, args.documents, seed) for seed in range(args.rounds)]
    rows = []
    for length in args.lengths:
        for method in METHODS:
            name = f"{length} {method}"
            shares = [percent(median(rounds, name, key)) for key in ("padding", "lost", "cut")]
            more = [r[name]["windows"] / r[f"{length} {BASELINE}"]["windows"] for r in rounds]
            seconds = three(median(rounds, name, "seconds"))
            rows.append([f"{length:,}", method, *shares, f"{statistics.median(more):.4f}", seconds])
    shares = ["padding", "tokens lost", "documents cut"]
    report(
        f"{args.documents:,} documents; medians of {args.rounds} seeds",
        ["length", "method", *shares, f"windows ÷ {BASELINE}", "CPU s"],
        rows, measured=rounds, to=args.json,
    )  # fmt: skip


def report_index(args: argparse.Namespace) -> None:
    kinds = ["packed", "documents"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--index={args.index}"]
        rounds = run_rounds("benchmarks.packing", kinds, args.rounds, Path(folder), arguments)
    rows = []
    for kind in kinds:
        s, cpu, mb, before, n_bytes, ms = (
            three(median(rounds, kind, key))
            for key in ("seconds", "CPU seconds", "MB", "MB before", "bytes", "open ms")
        )
        share = percent(median(rounds, kind, "padding"))
        ratio = ratios(rounds, kind, "CPU seconds", "packed")[0]
        rows.append([kind, s, cpu, ratio, f"{mb} ({before})", n_bytes, ms, share])
    report(
        f"{args.index:,} documents, windows of {LENGTH:,}; medians of {args.rounds} rounds",
        ["windows", "s", "CPU s", "speed ÷ packed", "MB", "bytes per document", "open, ms", "padding"],
        rows, measured=rounds, to=args.json,
    )  # fmt: skip


def report_batches(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    kinds, n = ["sliding", "packed", "documents"], 200
    corpus, loaders = RandomTokens(20_000_000, documents=True), {}
    with tempfile.TemporaryDirectory() as folder:
        corpus.publish(Path(folder))
        for kind in kinds:
            data = GPTDataModule(
                corpus, max_length=256, stride=256, batch_size=32, val_fraction=0, windows=kind,
                data_dir=folder,
            )  # fmt: skip
            data.setup("fit")
            loaders[kind] = epochs(data.train_dataloader())
        rounds: list[Round] = []
        for _ in range(1 + 3 * args.rounds):
            rounds.append({})
            for kind in kinds:
                start = time.thread_time()
                for _ in range(n):
                    next(loaders[kind])
                rounds[-1][kind] = {"µs": (time.thread_time() - start) / n * 1e6}
    rounds = rounds[1:]  # the first one warms up
    rows = [
        [kind, three(median(rounds, kind, "µs")), *ratios(rounds, kind, "µs", "sliding")]
        for kind in kinds
    ]
    report(
        f"{corpus.n_tokens:,} tokens, batches of (32, 256); medians of {len(rounds)} rounds",
        ["windows", "CPU µs per batch", "speed ÷ sliding", "lowest – highest"],
        rows, measured=rounds, to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
