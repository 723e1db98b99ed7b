"""All parts of a corpus, those that a killed build left whole and the others, however they are run.

write_parts(corpus, job, runner)  ->  the shards of all parts, in order
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.remote_file import TextFile, size_of
from lit_gptdata.tokens.build.encode import Job, OnProgress, write_part
from lit_gptdata.tokens.build.output import Shards
from lit_gptdata.tokens.engines import Engine, load_engine
from lit_gptdata.tokens.manifest import total

Todo = dict[int, list[FileSlice]]
"""Parts to write: their numbers and slices."""


class Runner(Protocol):
    """Who does the work of a build: processes of this machine, or a cluster."""

    def session(self) -> AbstractContextManager[None]:
        """Meanwhile the workers stay; one session may be inside another."""

    def write(
        self, job: Job, reading: Reading, todo: Todo, on_progress: OnProgress
    ) -> dict[int, Shards]:
        """Write parts; returns the shards of each.

        Raises what `write_part` raises, in a worker too; RuntimeError if workers are lost.
        """

    def hash(self, files: Sequence[TextFile], on_bytes: Callable[[int], object]) -> list[str]:
        """A `HashFiles`; raises OSError that names the file, RuntimeError if workers are lost."""


@dataclass(frozen=True)
class Worker:
    """Writes parts, one after the other; the engine is loaded for the first of them."""

    job: Job
    reading: Reading

    @functools.cached_property
    def engine(self) -> Engine:
        """Takes a second to load, and remembers the words that it has met."""
        return load_engine(self.job.tokenizer, self.job.engine)

    def write(
        self,
        part: int,
        slices: list[FileSlice],
        on_progress: OnProgress = lambda *_: None,
        *,
        leads: bool = False,
    ) -> Shards:
        """`write_part` of these slices."""
        documents = _documents(slices, self.reading)
        return write_part(self.job, part, documents, self.engine, on_progress, leads=leads or part == 0)


def counted(shards: Shards) -> tuple[int, int]:
    """UTF-8 bytes and tokens in shards, as an `OnProgress` takes them."""
    return total(shards, "n_bytes"), total(shards, "n_tokens")


def write_parts(corpus: Corpus, job: Job, runner: Runner) -> Shards:
    """Write the parts that are not there yet; returns the shards of all parts, in order.

    A corpus that is not files is written by this process, whoever the `runner` is.
    """
    if not isinstance(corpus, FilesCorpus):
        with progress_of("tokenising", None) as progress:
            engine = load_engine(job.tokenizer, job.engine)
            return write_part(job, 0, corpus, engine, progress.add, leads=True)
    _check_sizes(corpus, job)
    parts = corpus.work_units(job.shard_bytes, job.rule.first_cut if job.rule else None)
    whole = job.destination.kept()
    job.destination.remove_all_but(whole)
    todo = {part: slices for part, slices in enumerate(parts) if part not in whole}
    with progress_of("tokenising", _text_bytes(corpus)) as progress:
        for shards in whole.values():
            progress.add(counted(shards)[0])
        if todo:
            whole |= runner.write(job, corpus.reading, todo, progress.add)
    first = next((part for part in range(len(parts)) if whole[part]), 0)
    if first:  # the parts before hold no document at all: nothing to separate it from
        whole[first] = Worker(job, corpus.reading).write(first, parts[first], leads=True)
    job.destination.remove_all_but(whole)
    return [shard for part in range(len(parts)) for shard in whole[part]]


def _check_sizes(corpus: FilesCorpus, job: Job) -> None:
    """Refuse a text too long for `max_document_bytes` by its file's size: its parts do not know it."""
    limit = job.max_document_bytes
    for path in corpus.files:
        size, cut = size_of(path), format_of(path).cut
        if limit is not None and size > max(limit, job.shard_bytes) and cut == "inside_text":
            raise ValueError(
                f"{path}: the document is longer than max_document_bytes={limit:,}, the file has "
                f"{size:,}: leave it out, or raise the limit"
            )


def _documents(slices: list[FileSlice], reading: Reading) -> Iterator[Document]:
    return itertools.chain.from_iterable(read_documents(piece, reading) for piece in slices)


# Progress ------------------------------------------------------------------------------------------


def _text_bytes(corpus: FilesCorpus) -> int | None:
    """About the bytes of text in the corpus; None if only reading compressed files would tell."""
    if not all(format_of(file).plain for file in corpus.files):
        return None
    return sum(map(size_of, corpus.files))


class _Progress:
    """A bar of bytes, with tokens per second; silent where the output is no terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._tokens, self._start = bar, 0, time.perf_counter()

    def add(self, n_bytes: int, n_tokens: int = 0) -> None:
        """Note what was read or written."""
        self._tokens += n_tokens
        if self._tokens:
            rate = self._tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(n_bytes)


@contextlib.contextmanager
def progress_of(what: str, total: int | None) -> Iterator[_Progress]:
    """A bar while `what` goes on, over `total` bytes, None: not known."""
    # `delay`: what takes less than a second needs no bar
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, delay=1) as bar:
        yield _Progress(bar)
