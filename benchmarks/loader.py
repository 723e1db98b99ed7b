"""Time one training batch through the loader, against other loaders.

    python -m benchmarks.loader                        # 50 million tokens, 5 rounds
    python -m benchmarks.loader --only ours --rounds 9
    python -m benchmarks.loader --tokens 5000000 --json benchmarks/results/loader.json

A batch is (inputs, targets), int64 (32, 256) each, shuffled, with one window every 256 tokens, or with
packed documents. Each
measurement is a separate process with one torch thread and no workers. It warms up, then takes the
median of several chunks of batches. A round runs every candidate once, and ratios are taken within a
round. All files are in the page cache. Other libraries are measured if they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import (
    CourseDataset,
    RandomTokens,
    child_options,
    chosen,
    median,
    options,
    random_ids,
    ratios,
    report,
    run_rounds,
    three,
)
from lit_gptdata import GPTDataModule

BASELINE = "course"
B, L = 32, 256
Batch = tuple[Tensor, Tensor]
Candidate = Callable[[argparse.Namespace], Iterator[Batch]]


def epochs(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def course(args: argparse.Namespace) -> Iterator[Batch]:
    """The course's dataset in a DataLoader. It makes its tensors from an array instead of a list."""
    windows = CourseDataset(random_ids(args.course_tokens).astype(np.int64), L, stride=L)
    return epochs(DataLoader(windows, batch_size=B, shuffle=True, drop_last=True))


def ours(shards: int, windows: str = "sliding") -> Candidate:
    """`GPTDataModule.train_dataloader()` on a store with this number of shards."""

    def candidate(args: argparse.Namespace) -> Iterator[Batch]:
        data = GPTDataModule(
            RandomTokens(args.tokens, shards, documents=windows != "sliding"), windows=windows,
            max_length=L, stride=L, batch_size=B, val_fraction=0, data_dir=args.folder,
        )  # fmt: skip
        data.setup("fit")
        return epochs(data.train_dataloader())

    return candidate


def litdata(args: argparse.Namespace) -> Iterator[Batch]:
    """LitData's streaming dataset with blocks of 257 tokens, in a local folder."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=L + 1)
    blocks = StreamingDataset(
        str(args.folder / "litdata"), item_loader=loader, shuffle=True, drop_last=True
    )
    batches = epochs(StreamingDataLoader(blocks, batch_size=B, num_workers=0))
    return (inputs_and_targets(ids) for ids in batches)


def hugging_face(args: argparse.Namespace) -> Iterator[Batch]:
    """Hugging Face datasets: an Arrow file with lists of 257 ids, read as numpy arrays."""
    from datasets import load_from_disk

    blocks = load_from_disk(str(args.folder / "datasets")).with_format("numpy")

    def collate(rows: list[dict[str, np.ndarray]]) -> Batch:
        return inputs_and_targets(torch.from_numpy(np.stack([row["ids"] for row in rows])))

    return epochs(DataLoader(blocks, batch_size=B, shuffle=True, drop_last=True, collate_fn=collate))


def inputs_and_targets(ids: Tensor) -> Batch:
    """(B, L + 1) of any dtype → two int64 (B, L), contiguous."""
    return ids[:, :-1].to(torch.int64).contiguous(), ids[:, 1:].to(torch.int64).contiguous()


def nanogpt_way(args: argparse.Namespace) -> Iterator[Batch]:
    """Like nanoGPT's get_batch: map the file again for each batch, and take rows at random offsets."""
    path = next((args.folder / "tokens").glob("*/00000-000.bin"))

    def get_batch() -> Batch:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        begins = torch.randint(len(ids) - L, (B,)).tolist()
        inputs = torch.stack([torch.from_numpy(ids[i : i + L].astype(np.int64)) for i in begins])
        targets = torch.stack(
            [torch.from_numpy(ids[i + 1 : i + 1 + L].astype(np.int64)) for i in begins]
        )
        return inputs, targets

    return (get_batch() for _ in itertools.count())


def clone(args: argparse.Namespace) -> Iterator[Batch]:
    """Copy a finished batch, both tensors at once. No loader can be faster than this."""
    ids = torch.from_numpy(random_ids(B * (L + 1)).reshape(B, L + 1))
    batch = torch.stack(inputs_and_targets(ids))  # (2, B, L)
    return (batch.clone() for _ in itertools.count())


CANDIDATES: dict[str, Candidate] = {
    BASELINE: course,
    "ours": ours(1),
    "ours-64-shards": ours(64),
    "ours-packed": ours(1, "packed"),
    "ours-documents": ours(1, "documents"),
    "litdata": litdata,
    "datasets": hugging_face,
    "nanogpt-way": nanogpt_way,
    "clone": clone,
}


def why_skipped(name: str) -> str | None:
    """Return why a candidate cannot be measured on this machine, or None if it can."""
    if name in ("litdata", "datasets") and importlib.util.find_spec(name) is None:
        return "is not installed"
    return None


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one candidate in this process: microseconds per batch."""
    torch.set_num_threads(1)
    batches = CANDIDATES[name](args)
    for batch in itertools.islice(batches, args.chunk):
        inputs, targets = batch
    for ids in (inputs, targets):
        assert (ids.shape, ids.dtype) == ((B, L), torch.int64)
        assert ids.is_contiguous()
    is_text = targets != -100  # otherwise padding
    assert torch.equal(inputs[:, 1:][is_text[:, 1:]], targets[:, :-1][is_text[:, 1:]])
    seconds = []
    for _ in range(args.chunks):
        start = time.perf_counter()
        for batch in itertools.islice(batches, args.chunk):  # noqa: B007 keeps a batch while the next is made
            pass
        seconds.append(time.perf_counter() - start)
    return {"microseconds": statistics.median(seconds) / args.chunk * 1e6}


def prepare(names: list[str], args: argparse.Namespace) -> None:
    """Write the files that the candidates read. This is not timed."""
    RandomTokens(args.tokens).publish(args.folder)
    if "ours-64-shards" in names:
        RandomTokens(args.tokens, 64).publish(args.folder)
    if {"ours-packed", "ours-documents"} & {*names}:
        RandomTokens(args.tokens, documents=True).publish(args.folder)
    if "litdata" in names:
        from litdata import TokensLoader, optimize

        parts = [(seed, args.tokens // 8) for seed in range(8)]
        optimize(
            fn=_litdata_items, inputs=parts, output_dir=str(args.folder / "litdata"), num_workers=1,
            chunk_size=(L + 1) * 131_072, item_loader=TokensLoader(block_size=L + 1),
        )  # fmt: skip
    if "datasets" in names:
        import pyarrow
        from datasets import Dataset

        ids = pyarrow.array(random_ids(args.tokens // (L + 1) * (L + 1)))
        table = pyarrow.table({"ids": pyarrow.FixedSizeListArray.from_arrays(ids, L + 1)})
        Dataset(table).save_to_disk(str(args.folder / "datasets"))


def _litdata_items(part: tuple[int, int]) -> Iterator[Tensor]:
    seed, n = part
    yield torch.from_numpy(random_ids(n, seed))


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument(
        "--course-tokens", type=int, help="default: --tokens, or less on a small machine"
    )
    parser.add_argument("--chunk", type=int, default=500, help="batches per timing")
    parser.add_argument("--chunks", type=int, default=8)
    child_options(parser)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.course_tokens is None:  # it keeps 20 bytes per token, and 10 more while it builds
        args.course_tokens = min(args.tokens, memory // 60)
    wanted = chosen(list(CANDIDATES), args.only, BASELINE)
    names = [name for name in wanted if not why_skipped(name)]
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        prepare(names, args)
        forwarded = ("tokens", "course_tokens", "chunk", "chunks")
        arguments = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in forwarded]
        rounds = run_rounds("benchmarks.loader", names, args.rounds, args.folder, arguments)
    key = "microseconds"
    rows = [
        [name, three(median(rounds, name, key)), *ratios(rounds, name, key, BASELINE)] for name in names
    ]
    notes = [f"{name} {why_skipped(name)}." for name in wanted if why_skipped(name)]
    for name in ("ours-packed", "ours-documents"):
        if {name, "ours"} <= {*names}:
            factor, span = ratios(rounds, "ours", key, name)
            notes.append(f"{name} ÷ ours: {factor} ({span})")
    if args.course_tokens != args.tokens:
        notes.append(f"{BASELINE} has {args.course_tokens:,} tokens.")
    report(
        f"{args.tokens:,} tokens, batches of ({B}, {L}), no workers, one torch thread; "
        f"medians of {args.rounds} rounds, in each of {args.chunks} chunks of {args.chunk} batches",
        ["candidate", "µs per batch", f"speed ÷ {BASELINE}", "lowest – highest"],
        rows, measured=rounds, notes=notes, to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
