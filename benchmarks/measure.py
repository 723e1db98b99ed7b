"""Shared code of the benchmarks: stores of random tokens, the course's dataset, child processes, tables.

Run the scripts from the root of the repository, as in `python -m benchmarks.loader`. If this folder were
first on the path, its tokenize.py would hide the module of the standard library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_gptdata.text.document import Document
from lit_gptdata.tokens.build import local as build
from lit_gptdata.tokens.build.output import ShardOutput, Shards, ShardWriter
from lit_gptdata.tokens.manifest import ShardEntry
from lit_gptdata.tokens.tokenizer import Tokenizer

Round = dict[str, dict[str, float]]
"""The results of one round: candidate → quantity → value."""

CHUNK = 16_384  # ids of 64 KiB of text, which a store indexes as one chunk
PACKAGES = ("torch", "numpy", "lightning", "litdata", "datasets", "gigatoken", "ray")


@dataclass(frozen=True)
class RandomTokens:
    """A corpus without text. Its store has random gpt2 ids in shards of equal size.

    With `documents`, their lengths are log-normal, with a median of 300 tokens and sigma 1.2.
    """

    n_tokens: int
    shards: int = 1
    documents: bool = False

    def __iter__(self) -> Iterator[Document]:
        return iter(())

    @property
    def fingerprint(self) -> str:
        return repr(self)

    def publish(self, data_dir: Path) -> None:
        """Run the real `prepare_store`, but with random ids instead of encoded text."""

        def encode_corpus(plan: Any, output: ShardOutput, runner: Any) -> tuple[Shards, list[Any]]:
            return [self._write_shard(number, output) for number in range(self.shards)], []

        with patch.object(build, "encode_corpus", encode_corpus):
            build.prepare_store(self, Tokenizer("gpt2"), data_dir / "tokens")

    def _write_shard(self, number: int, output: ShardOutput) -> ShardEntry:
        writer = ShardWriter(output.store, f"{number:05}-000", np.dtype("<u2"))
        ends = [self.n_tokens * i // self.shards for i in (number, number + 1)]
        begin, lengths = ends[0], np.random.default_rng(number)
        while begin < ends[1]:
            writer.start_chunk(source=0, starts_document=begin == 0 or self.documents)
            n = int(lengths.lognormal(np.log(300), 1.2)) + 1 if self.documents else CHUNK
            ids = random_ids(min(n, ends[1] - begin), seed=begin)
            if self.documents:
                ids[-1] = 50_256  # ends the document
            writer.append(ids, n_bytes=4 * len(ids))
            begin += len(ids)
        return writer.finish()


def random_ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_257, n, dtype=np.uint16)


class CourseDataset(Dataset[tuple[Tensor, Tensor]]):
    """The course's dataset: it keeps the inputs and the targets of every window as tensors in lists."""

    def __init__(self, ids: Sequence[int] | np.ndarray, max_length: int, stride: int) -> None:
        self.inputs, self.targets = [], []
        for begin in range(0, len(ids) - max_length, stride):
            window = ids[begin : begin + max_length + 1]
            self.inputs.append(torch.tensor(window[:-1], dtype=torch.int64))
            self.targets.append(torch.tensor(window[1:], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def options(doc: str, rounds: int) -> argparse.ArgumentParser:
    """Make a parser with the options of every script."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def child_options(parser: argparse.ArgumentParser) -> None:
    """Add --only, and the two hidden options that a script passes to its child processes."""
    parser.add_argument("--only", help="candidates, comma-separated; the baseline is always run")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def chosen(names: Sequence[str], only: str | None, baseline: str) -> list[str]:
    """Return the candidates to run. Raises ValueError for an unknown one."""
    wanted = [baseline, *only.split(",")] if only else list(names)
    if unknown := set(wanted) - set(names):
        raise ValueError(f"unknown candidates {sorted(unknown)}; choose from {list(names)}")
    return [name for name in names if name in wanted]


def run_rounds(
    module: str, names: Sequence[str], rounds: int, folder: Path, arguments: Sequence[str] = ()
) -> list[Round]:
    """Run each candidate in a separate process, one after the other, and repeat that `rounds` times."""
    command = [sys.executable, "-m", module, f"--folder={folder}", *arguments, "--measure"]
    return [{name: _child([*command, name], folder) for name in names} for _ in range(rounds)]


def _child(command: list[str], folder: Path) -> dict[str, float]:
    _read_all(folder)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _read_all(folder: Path) -> None:
    """Read every file into the page cache again, because the system may have dropped some."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def median(rounds: Sequence[Round], name: str, key: str) -> float:
    return statistics.median(r[name][key] for r in rounds)


def ratios(rounds: Sequence[Round], name: str, key: str, baseline: str) -> list[str]:
    """Divide baseline by candidate within each round: the median, and "lowest – highest"."""
    each = [r[baseline][key] / r[name][key] for r in rounds]
    return [three(statistics.median(each)), f"{three(min(each))} – {three(max(each))}"]


def three(value: float) -> str:
    """Format with three significant digits, or all digits of an integer: 0.0123, 1.23, 12.3, 12,345."""
    digits = max(0, 2 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{digits}f}"


def machine() -> str:
    """Describe the processor, the versions and the commit that is measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    parts = [f"{(models or [platform.processor()])[0]}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    installed = {d.name.lower() for d in importlib.metadata.distributions() if d.name}
    parts += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed]
    return ", ".join([*parts, f"commit {_commit()}"])


def _commit() -> str:
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../lit_gptdata"]).returncode
    return head.stdout.strip() + (" with changes" if changed else "")


def report(
    setting: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    measured: Any,
    notes: Sequence[str] = (),
    to: Path | None,
) -> None:
    """Print the table. If `to` is given, write it there as JSON, together with `measured`."""
    result = {
        "setting": setting, "columns": columns, "rows": rows, "notes": notes, "machine": machine(),
        "measured": measured,
    }  # fmt: skip
    print("\n" + markdown(result))
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    table = [result["columns"], ["---"] * len(result["columns"]), *result["rows"]]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n\n".join([result["setting"], "\n".join(lines), *result["notes"], result["machine"]])
