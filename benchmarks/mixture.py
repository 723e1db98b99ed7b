"""Measure a mixture of named sources: the cost of a batch, and the time to the first one.

    python -m benchmarks.mixture                       # up to 100 sources; writes 2.2 GB
    python -m benchmarks.mixture --only mix-8 --rounds 9
    python -m benchmarks.mixture --json benchmarks/results/mixture.json

`one` is a corpus without a name, and `mix-8` has the same tokens in 8 sources with weights from 0.02 to
0.3. `stages-8` has them in two stages, and `mix-100` has 100 sources. Each source has 10 million tokens.
Windows have 256 tokens every 128 tokens, and batches have 32 of them. The text is tokenized before the
clock starts, and all files are in the page cache.

Each measurement is a separate process. A round runs every candidate once, and ratios are taken within
a round. The first batch is timed from `setup()`, after the imports. Memory is the growth of the process
in that time (Linux only), as in startup.py: private memory includes pages of files. A batch is the mean
CPU time over an epoch, at most 20,000 batches, after one epoch that is not timed.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    RandomTokens,
    child_options,
    chosen,
    median,
    options,
    ratios,
    report,
    run_rounds,
    three,
)
from benchmarks.startup import memory
from lit_gptdata import GPTDataModule

B, L = 32, 256
SOURCE = 10_000_000  # tokens
WEIGHTS = (0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02)
BASELINE = "one"


def texts(n: int) -> dict[str, RandomTokens]:
    """Named texts with different lengths, because equal texts would share a store."""
    return {f"s{i}": RandomTokens(SOURCE + i) for i in range(n)}


def mixed(n: int) -> dict[str, Any]:
    weights = itertools.cycle(WEIGHTS)
    return {name: {"path": text, "weight": next(weights)} for name, text in texts(n).items()}


def stages() -> list[dict[str, Any]]:
    weights = dict(zip(texts(8), WEIGHTS, strict=True))
    return [{"tokens": 40_000_000, "weights": dict.fromkeys(weights, 1)}, {"weights": weights}]


CANDIDATES: dict[str, dict[str, Any]] = {
    BASELINE: {"corpus": RandomTokens(8 * SOURCE, shards=8)},
    "mix-8": {"corpus": mixed(8)},
    "stages-8": {"corpus": texts(8), "stages": stages()},
    "mix-100": {"corpus": mixed(100)},
}


def measure(name: str, folder: Path, n: int = 20_000) -> dict[str, float]:
    """Run one candidate in this process: time and memory to the first batch, microseconds per batch."""
    torch.set_num_threads(1)
    data = GPTDataModule(**CANDIDATES[name], max_length=L, batch_size=B, data_dir=folder)
    before, start = memory(), time.perf_counter()
    data.setup("fit")
    loader = data.train_dataloader()
    batches: Iterator[Any] = iter(loader)
    inputs, targets = next(batches)
    milliseconds, after = (time.perf_counter() - start) * 1e3, memory()
    assert inputs.shape == targets.shape == (B, L)
    deque(itertools.islice(batches, n), maxlen=1)  # the first epoch maps the files
    start, count = time.process_time(), 0
    for batch in itertools.islice(loader, n):  # noqa: B007 keeps a batch while the next is made
        count += 1
    microseconds = (time.process_time() - start) / count * 1e6
    growth = {key: after[key] - before[key] for key in after}
    return {"milliseconds": milliseconds, "microseconds": microseconds, **growth}


def main() -> None:
    parser = options(__doc__, rounds=5)
    child_options(parser)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    names = chosen(list(CANDIDATES), args.only, BASELINE)
    with tempfile.TemporaryDirectory() as folder:
        CANDIDATES[BASELINE]["corpus"].publish(Path(folder))
        for text in texts(100 if "mix-100" in names else 8).values():
            text.publish(Path(folder))
        rounds = run_rounds("benchmarks.mixture", names, args.rounds, Path(folder))
    rows = [
        [
            name,
            *(three(median(rounds, name, key)) for key in ("milliseconds", "private", "anonymous")),
            three(median(rounds, name, "microseconds")),
            *ratios(rounds, name, "microseconds", BASELINE),
        ]
        for name in names
    ]
    columns = ["candidate", "ms to the first batch", "private MB", "anonymous MB", "µs per batch"]
    report(
        f"Batches of ({B}, {L}), no workers, one torch thread; medians of {args.rounds} rounds",
        [*columns, f"speed ÷ {BASELINE}", "lowest – highest"],
        rows, measured=rounds, to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
