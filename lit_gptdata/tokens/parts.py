"""All parts of a corpus, written by this process or by several; parts that are whole are kept."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.remote import size_of
from lit_gptdata.tokens.encode import Job, Shards, write_part
from lit_gptdata.tokens.engine import Engine, load_engine


def write_parts(corpus: Corpus, job: Job, workers: int | None) -> Shards:
    """Write the parts that are not there yet; returns the shards of all parts, in order.

    `workers`: processes; None: one a core. A corpus that is not files is written by this one.
    """
    if not isinstance(corpus, FilesCorpus):
        with _progress(None) as progress:
            engine = load_engine(job.tokenizer, job.engine)
            return write_part(job, 0, corpus, engine, progress.add, leads=True)
    _check_sizes(corpus, job)
    parts = corpus.parts(job.shard_bytes, job.rule.first_cut if job.rule else None)
    whole = {part: shards for part in range(len(parts)) if (shards := _whole(job, part)) is not None}
    _remove_others(job, whole)
    todo = {part: slices for part, slices in enumerate(parts) if part not in whole}
    workers = min(workers or os.cpu_count() or 1, len(todo))
    with _progress(_text_bytes(corpus)) as progress:
        for shards in whole.values():
            progress.add(sum(s["n_bytes"] for s in shards), 0)
        if workers > 1:
            whole |= _by_processes(job, todo, corpus.reading, workers, progress)
        elif todo:
            engine = load_engine(job.tokenizer, job.engine)
            for part, slices in todo.items():
                documents = _documents(slices, corpus.reading)
                whole[part] = write_part(job, part, documents, engine, progress.add, leads=part == 0)
    first = next((part for part in range(len(parts)) if whole[part]), 0)
    if first:  # the parts before hold no document at all: nothing to separate it from
        documents = _documents(parts[first], corpus.reading)
        engine = load_engine(job.tokenizer, job.engine)
        whole[first] = write_part(job, first, documents, engine, lambda *_: None, leads=True)
    _remove_others(job, whole)
    return [shard for part in range(len(parts)) for shard in whole[part]]


def _check_sizes(corpus: FilesCorpus, job: Job) -> None:
    """Refuse a text too long for `max_document_bytes` by its file's size: its parts do not know it."""
    limit = job.max_document_bytes
    for path in corpus.files:
        size = size_of(path)
        if limit is not None and size > max(limit, job.shard_bytes) and format_of(path) == ("txt", ""):
            raise ValueError(
                f"{path}: the document is longer than max_document_bytes={limit:,}, the file has "
                f"{size:,}: leave it out, or raise the limit"
            )


def _documents(slices: list[FileSlice], reading: Reading) -> Iterator[Document]:
    return itertools.chain.from_iterable(read_documents(piece, reading) for piece in slices)


def _whole(job: Job, part: int) -> Shards | None:
    """The shards of a part that a killed build left, if they are all there."""
    try:
        shards: Shards = json.loads(job.note(part).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    files = [file for shard in shards for file in shard["files"]]
    sizes = [_size(job, file["name"]) for file in files]
    return shards if sizes == [file["size"] for file in files] else None


def _size(job: Job, name: str) -> int | None:
    path = job.folder / "store" / name
    return path.stat().st_size if path.is_file() else None


def _remove_others(job: Job, whole: dict[int, Shards]) -> None:
    """Remove what a kill left half-written, or a worker in the moment after its parent's death."""
    keep = {file["name"] for shards in whole.values() for shard in shards for file in shard["files"]}
    for path in (job.folder / "store").iterdir():
        if path.name not in keep:
            path.unlink(missing_ok=True)


# Worker processes ----------------------------------------------------------------------------------

_worker: tuple[Job, Reading] | None = None
"""What a worker process keeps between two parts."""


def _by_processes(
    job: Job, todo: dict[int, list[FileSlice]], reading: Reading, workers: int, progress: _Progress
) -> dict[int, Shards]:
    spawn = multiprocessing.get_context("spawn")  # a fork beside torch's threads may hang
    lifeline, held_here = spawn.Pipe(duplex=False)
    whole = {}
    begin = _begin_worker, (job, reading, lifeline)
    with lifeline, held_here, ProcessPoolExecutor(workers, spawn, *begin) as pool:
        try:
            with _bare_main(), _no_ctrl_c():  # the pool starts its processes while tasks are submitted
                futures = {pool.submit(_work, part, slices): part for part, slices in todo.items()}
            for future in as_completed(futures):
                shards = whole[futures[future]] = future.result()
                progress.add(sum(s["n_bytes"] for s in shards), sum(s["n_tokens"] for s in shards))
        except BaseException as error:
            # Ends the workers at once, where a part may take minutes; and after one was killed the
            # pool's own signal does not always reach the others, for which it would wait for ever.
            held_here.close()
            if isinstance(error, BrokenProcessPool):
                raise RuntimeError(
                    "a process that tokenises was killed, perhaps because memory ran out: run again, "
                    f"with fewer than build_workers={workers}; what is whole is kept"
                ) from error
            raise
    return whole


@contextlib.contextmanager
def _bare_main() -> Iterator[None]:
    """Keep spawned processes from importing the user's script: it would load torch, or run twice."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C; this one sees it afterwards and ends them."""
    seen: list[int] = []
    handler = signal.getsignal(signal.SIGINT)  # None: not Python's
    if threading.current_thread() is not threading.main_thread():  # the only one that may set it
        handler = None
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if seen:
            signal.raise_signal(signal.SIGINT)


def _begin_worker(job: Job, reading: Reading, lifeline: Connection) -> None:
    global _worker
    _worker = job, reading
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """End this process when its parent ends or gives up: a killed build must not go on writing."""
    multiprocessing.connection.wait([lifeline])  # the parent holds the other end, and sends nothing
    os._exit(1)


@functools.cache
def _engine(job: Job) -> Engine:
    return load_engine(job.tokenizer, job.engine)


def _work(part: int, slices: list[FileSlice]) -> Shards:
    assert _worker is not None
    job, reading = _worker
    documents = _documents(slices, reading)
    return write_part(job, part, documents, _engine(job), lambda *_: None, leads=part == 0)


# Progress ------------------------------------------------------------------------------------------


def _text_bytes(corpus: FilesCorpus) -> int | None:
    """Bytes of text to come; None where files are packed, and only reading them would tell."""
    if any(format_of(path) not in (("txt", ""), ("jsonl", "")) for path in corpus.files):
        return None
    return sum(map(size_of, corpus.files))


class _Progress:
    """A bar of bytes, with tokens per second; silent where the output is no terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._tokens, self._start = bar, 0, time.perf_counter()

    def add(self, n_bytes: int, n_tokens: int) -> None:
        """Note what was written."""
        self._tokens += n_tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(n_bytes)


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[_Progress]:
    # `delay`: what takes less than a second needs no bar
    with tqdm(desc="tokenising", total=total, unit="B", unit_scale=True, disable=None, delay=1) as bar:
        yield _Progress(bar)
