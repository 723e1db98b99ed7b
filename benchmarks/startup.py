"""Measure time and memory from nothing to the first training batch, against the course's dataset.

    python -m benchmarks.startup                       # 10 and 500 million tokens; writes 1 GB
    python -m benchmarks.startup --only datamodule-10M --rounds 9
    python -m benchmarks.startup --json benchmarks/results/startup.json

Windows have 256 tokens and start at every token (stride 1). Batches have 32 shuffled windows.
`datamodule` constructs the data module, sets it up and loads a batch. `windows` starts from an open
store and uses `Windows` and `window_loader`. The text is tokenized before the clock starts. The course's
dataset gets its ids as a list. All files are in the page cache.

Each measurement is a separate process and starts after the imports. A round runs every candidate once,
and ratios are taken within a round. Memory is the growth of the process (Linux only). Private memory
belongs to no other process; it includes pages of files, which the system can drop at any time. Anonymous
memory is the part without pages of files.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from lit_gptdata.tokens.build.local import find_store
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.steps import Steps

B, L, STRIDE = 32, 256, 1
M = 1_000_000
SHARD = 15 * M  # tokens in a shard that the package writes: 64 MiB of text
Run = Callable[[], tuple[object, tuple[Tensor, Tensor]]]
"""Makes the first batch. Returns the objects that a training run would keep, and the batch."""


def corpus_of(n_tokens: int) -> RandomTokens:
    return RandomTokens(n_tokens, shards=-(-n_tokens // SHARD))


def datamodule(n_tokens: int) -> Callable[[Path], Run]:
    def candidate(folder: Path) -> Run:
        def run() -> tuple[object, tuple[Tensor, Tensor]]:
            data = GPTDataModule(
                corpus_of(n_tokens),
                max_length=L, stride=STRIDE, batch_size=B, val_fraction=0, data_dir=folder,
            )  # fmt: skip
            data.setup("fit")
            batches = iter(data.train_dataloader())
            return (data, batches), next(batches)

        return run

    return candidate


def windows(n_tokens: int) -> Callable[[Path], Run]:
    def candidate(folder: Path) -> Run:
        store = find_store(corpus_of(n_tokens), Tokenizer("gpt2"), folder / "tokens")
        assert store is not None

        def run() -> tuple[object, tuple[Tensor, Tensor]]:
            windows = Windows(store.tokens, begin=0, end=store.n_tokens, max_length=L, stride=STRIDE)
            steps = Steps(n=len(windows), batch_size=B)
            batches = iter(window_loader(windows, steps, seed=0))
            return batches, next(batches)

        return run

    return candidate


def course(n_tokens: int) -> Callable[[Path], Run]:
    def candidate(folder: Path) -> Run:
        ids = random_ids(n_tokens).tolist()

        def run() -> tuple[object, tuple[Tensor, Tensor]]:
            dataset = CourseDataset(ids, L, STRIDE)
            batches = iter(DataLoader(dataset, batch_size=B, shuffle=True, drop_last=True))
            return batches, next(batches)

        return run

    return candidate


SIZES = {"10M": 10 * M, "500M": 500 * M}
BASELINE = "course-1M"
CANDIDATES = {
    BASELINE: course(M),
    **{f"datamodule-{size}": datamodule(n) for size, n in SIZES.items()},
    **{f"windows-{size}": windows(n) for size, n in SIZES.items()},
}


def memory() -> dict[str, float]:
    """Return the private and the anonymous memory of this process, in MB."""
    text = Path("/proc/self/smaps_rollup").read_text()
    mb = {key: int(kib) * 1024 / 1e6 for key, kib in re.findall(r"(\w+): +(\d+)", text)}
    return {"private": mb["Private_Clean"] + mb["Private_Dirty"], "anonymous": mb["Anonymous"]}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one candidate in this process: milliseconds, and the growth of memory in MB."""
    torch.set_num_threads(1)
    run = CANDIDATES[name](folder)
    before = memory()
    start = time.perf_counter()
    kept, (inputs, targets) = run()
    milliseconds = (time.perf_counter() - start) * 1e3
    after = memory()
    assert inputs.shape == targets.shape == (B, L), kept
    return {"milliseconds": milliseconds, **{key: after[key] - before[key] for key in after}}


def main() -> None:
    parser = options(__doc__, rounds=3)
    child_options(parser)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    names = chosen(list(CANDIDATES), args.only, BASELINE)
    with tempfile.TemporaryDirectory() as folder:
        for size, n_tokens in SIZES.items():
            if any(name.endswith(size) for name in names):
                corpus_of(n_tokens).publish(Path(folder))
        rounds = run_rounds("benchmarks.startup", names, args.rounds, Path(folder))
    rows = [
        [
            name,
            *(three(median(rounds, name, key)) for key in ("milliseconds", "private", "anonymous")),
            *ratios(rounds, name, "milliseconds", BASELINE),
        ]
        for name in names
    ]
    report(
        f"To the first batch of ({B}, {L}), stride {STRIDE}; medians of {args.rounds} rounds",
        ["candidate", "ms", "private MB", "anonymous MB", f"speed ÷ {BASELINE}", "lowest – highest"],
        rows, measured=rounds, to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
