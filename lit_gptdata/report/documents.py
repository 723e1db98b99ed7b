"""The loss of each document, from the losses of targets: a table in a file, two lists and a picture.

DocumentLosses(store, begin, end)  ──add(losses, tokens)──▶  blocks() of rows, one per document
"""

import contextlib
import csv
import errno
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._io import AtomicFile, aligned, write_whole
from lit_gptdata.report.show import visible
from lit_gptdata.text.formats import needs
from lit_gptdata.tokens.manifest import total
from lit_gptdata.tokens.store import TokenStore

COLUMNS = {
    "name": "string", "source": "string", "document": "int64", "byte_begin": "int64",
    "byte_end": "int64", "tokens": "int64", "nats": "double", "bits_per_byte": "double",
}  # fmt: skip
"""The columns of the file, with their types in Parquet."""
BLOCK = 65_536  # documents that become rows at a time
LISTED = 20  # documents in each list
TEXT_CHARACTERS = 80  # of a document's text in a list


class DocumentLosses:
    """The summed loss and the targets of each document with tokens in [begin, end) of a store.

    `sums`, float64 (2, D): nats and targets, which may be added over ranks. `finish` does the rest.
    """

    def __init__(self, name: str, store: TokenStore, begin: int, end: int) -> None:
        """`name`: of the source; "" without names. Reads the indexes of the shards with these tokens."""
        self.name, self.store, self.begin, self.end = name, store, begin, end
        first = last = store.row_at("token", begin)[0]
        found = [store.document_rows([first])]
        while not (found[0]["token"] <= begin + 1).any():  # the document starts in an earlier shard
            first -= 1
            found.insert(0, store.document_rows([first]))
        while last + 1 < len(store.shards) and not (found[-1]["token"] > end).any():
            last += 1
            found.append(store.document_rows([last]))
        rows = np.concatenate(found)
        # A document whose separator is the first token of the range has no target in it.
        low, high = np.searchsorted(rows["token"], [begin + 1, end], side="right") - [1, 0]
        self.first = total(store.shards[:first], "n_documents") + int(low) + 1
        self._rows = rows[low:high]
        last_ends = np.array([(store.n_tokens + 1, store.n_bytes, 0, 1)], rows.dtype)
        edges = np.append(rows, last_ends)[low : high + 1]  # (D + 1,)
        self._starts, self._bytes = edges["token"].copy(), edges["byte"].copy()
        self.sums = np.zeros((2, len(self._rows)))

    def add(self, losses: np.ndarray, tokens: np.ndarray) -> None:
        """Add losses in nats, float (N,), of targets with these numbers in the store, int64 (N,).

        A separator belongs to the document that it ends. -1 is the one that ends the range.
        """
        tokens = np.where(tokens < 0, self.end, tokens)
        documents = np.searchsorted(self._starts[:-1], tokens, side="right") - 1
        np.add.at(self.sums[0], documents, losses)
        np.add.at(self.sums[1], documents, 1.0)  # an int takes 15 times as long

    def finish(self) -> None:
        """Compute what follows from the sums: the bytes of the scored text, and bits per byte."""
        self.nats, self.tokens = self.sums[0], self.sums[1].astype(np.int64)
        begin, starts, stops = self.begin, self._starts[:-1], self._starts[1:]
        if self.tokens[0] < min(stops[0], self.end) - max(starts[0], begin):
            begin += 1  # the first token of sliding windows is not a target
        self._begins = np.zeros(len(starts), np.int64)  # byte in the document's text
        self._ends = np.diff(self._bytes)
        known = np.ones(len(starts), bool)
        if begin > starts[0]:
            self._begins[0] = self.store.byte_at(begin) - self._bytes[0]
            known[0] = self.store.is_exact_at(begin)
        if self.end < stops[-1] - 1:
            self._ends[-1] = self.store.byte_at(self.end) - self._bytes[-2]
            known[-1] &= self.store.is_exact_at(self.end)
        self._texts = np.maximum(starts, begin), np.minimum(stops - 1, self.end)  # token ranges
        self.known = known
        self.bytes = np.where(known, self._ends - self._begins, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.bits = np.where(self.bytes > 0, self.nats / math.log(2) / self.bytes, np.nan)

    def source(self, index: int) -> str:
        """The path or name of a document's source."""
        return self.store.source_of(self._rows[index])

    def text(self, index: int, tokenizer: Any) -> str:
        """The start of a document's scored text, without characters that control a terminal."""
        begin, end = (int(edges[index]) for edges in self._texts)
        text = tokenizer.decode(self.store.tokens[begin : min(end, begin + TEXT_CHARACTERS)].tolist())
        return visible(text[:TEXT_CHARACTERS], "⏎", "⇥")

    def blocks(self) -> Iterator[list[list[Any]]]:
        """The COLUMNS of up to BLOCK documents at a time, without documents that have no target."""
        scored = np.flatnonzero(self.tokens)
        unknown, no_bits = ~self.known, np.isnan(self.bits)
        for of in (scored[i : i + BLOCK] for i in range(0, len(scored), BLOCK)):
            # a masked value becomes None
            begins, ends = (np.ma.array(e[of], mask=unknown[of]) for e in (self._begins, self._ends))
            bits = np.ma.array(self.bits[of], mask=no_bits[of])
            numbers = [self.first + of, begins, ends, self.tokens[of], self.nats[of], bits]
            sources = [self.source(index) for index in of.tolist()]
            yield [[self.name] * len(of), sources, *(each.tolist() for each in numbers)]


def check_output(path: Path) -> None:
    """Raise ValueError, FileNotFoundError or ImportError if the scores cannot be written there."""
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"output must be a .csv or .parquet file, got {path}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a folder: set output=… to a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist: make this folder, or set output=…")
    if not os.access(path.parent, os.W_OK):
        problem = "Permission denied: set output=… to a file in another folder"
        raise PermissionError(errno.EACCES, problem, str(path))
    if path.suffix == ".parquet":
        needs("pyarrow.parquet", "parquet", path.name)


def write_scores(path: Path, sets: Sequence[DocumentLosses]) -> None:
    """Write a row for each document, atomically; raises OSError."""
    blocks = (block for each in sets for block in each.blocks())
    try:
        with contextlib.closing(AtomicFile(path)) as file:
            if path.suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet

                schema = pyarrow.schema(COLUMNS.items())
                with pyarrow.parquet.ParquetWriter(file.temporary, schema) as writer:
                    for block in blocks:
                        writer.write_table(pyarrow.table(block, schema=schema))
            else:
                file.write(f"{','.join(COLUMNS)}\n".encode())
                for block in blocks:
                    rows = zip(*block, strict=True)
                    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(rows)
                    file.write(text.getvalue().encode(errors="backslashreplace"))
            file.commit()
    except OSError as error:  # pyarrow's does not name the file
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def describe(sets: Sequence[DocumentLosses], min_tokens: int, tokenizer: Any) -> list[str]:
    """The totals of each set, and the documents with the highest and the lowest loss, in lines."""
    rows = [["set", "documents", "tokens", "bytes", "nats per token", "bits per byte"]]
    for each in sets:
        n, nats, n_bytes = int(each.tokens.sum()), float(each.nats.sum()), int(each.bytes.sum())
        size, rate = "", "not known"
        if n_bytes and each.known[each.tokens > 0].all():
            size, rate = f"{n_bytes:,}", f"{nats / math.log(2) / n_bytes:.4f}"
        counts = [f"{np.count_nonzero(each.tokens):,}", f"{n:,}", size, f"{nats / max(1, n):.4f}"]
        rows.append([each.name or "corpus", *counts, rate])
    unit, losses = losses_of(sets, min_tokens)
    firsts, values = np.cumsum([0, *map(len, losses)]), np.concatenate(losses)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    lists = {f"highest {unit}": order[::-1][:LISTED], f"lowest {unit}": order[:LISTED]}
    if len(order) <= 2 * LISTED:
        lists = {f"{unit}, the highest first": order[::-1]}
    about = f"of the {len(order):,} documents with ≥ {min_tokens} tokens (min_tokens=…)"
    lines = aligned(rows)
    for title, chosen in lists.items():
        lines += ["", f"{title}, {about}:"]
        rows = [["source", "document", "tokens", "bytes", unit, "text"]]
        for at in chosen.tolist():
            number = int(np.searchsorted(firsts, at, side="right")) - 1
            each, i = sets[number], at - int(firsts[number])
            path = each.source(i).removeprefix(f"{Path.cwd()}/")
            source = ": ".join(filter(None, [each.name, path]))
            source = source if len(source) <= 40 else f"…{source[-39:]}"
            size = f"{each.bytes[i]:,}" if each.known[i] else ""
            counts = [f"{each.first + i:,}", f"{each.tokens[i]:,}", size, f"{values[at]:.4f}"]
            rows.append([visible(source, "⏎", "⇥"), *counts, each.text(i, tokenizer)])
        lines += aligned(rows)
    return lines


def losses_of(sets: Sequence[DocumentLosses], min_tokens: int) -> tuple[str, list[np.ndarray]]:
    """The unit, and the loss of each document, float64 (D,) per set; nan for short documents.

    The unit is bits per byte, or nats per token if the bytes of none of them are known.
    """
    is_long = [each.tokens >= max(1, min_tokens) for each in sets]
    unit, losses = "bits per byte", [each.bits for each in sets]
    if not any(np.isfinite(each[of]).any() for each, of in zip(losses, is_long, strict=True)):
        unit, losses = "nats per token", [each.nats / np.maximum(1, each.tokens) for each in sets]
    return unit, [np.where(of, each, np.nan) for each, of in zip(losses, is_long, strict=True)]


def draw_scores(sets: Sequence[DocumentLosses], min_tokens: int, path: Path) -> None:
    """Write a PNG: a histogram of the documents' losses, per set."""
    from matplotlib.figure import Figure

    unit, losses = losses_of(sets, min_tokens)
    losses = [each[np.isfinite(each)] for each in losses]
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    n = sum(map(len, losses))
    bins = np.histogram_bin_edges(np.concatenate(losses), min(60, 10 + n // 20))
    style: Any = "step" if len(sets) > 1 else "stepfilled"
    axes.hist(losses, bins.tolist(), histtype=style, log=True, label=[each.name for each in sets])
    axes.set(xlabel=unit, ylabel="documents, on a log scale", ylim=(0.5, None))  # 1 is visible
    axes.set_title(f"loss of {n:,} documents with ≥ {min_tokens} tokens")
    axes.grid(alpha=0.3)
    if len(sets) > 1:
        figure.legend(loc="outside right upper")
    figure.savefig(content := io.BytesIO(), format="png", dpi=120)
    write_whole(path, content.getbuffer())
