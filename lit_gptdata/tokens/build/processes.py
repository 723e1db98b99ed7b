"""The work of a build by processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from lit_gptdata.text.files import hash_files
from lit_gptdata.text.formats import FileSlice, Reading
from lit_gptdata.text.remote_file import TextFile
from lit_gptdata.tokens.build.encode import Job, OnProgress
from lit_gptdata.tokens.build.output import Shards
from lit_gptdata.tokens.build.parts import Todo, Worker, counted

_worker: Worker | None = None
"""What a worker process keeps between two parts."""


@dataclass(frozen=True)
class Processes:
    """A `Runner`: processes of this machine, None: one a core; this one alone where one is enough."""

    workers: int | None = None

    def session(self) -> AbstractContextManager[None]:
        """Processes begin and end with each `write`."""
        return contextlib.nullcontext()

    def hash(self, files: Sequence[TextFile], on_bytes: Callable[[int], object]) -> list[str]:
        """The SHA-256 (hex) of each file, by as many threads of this process."""
        return hash_files(files, on_bytes, self.workers or os.cpu_count())

    def write(
        self, job: Job, reading: Reading, todo: Todo, on_progress: OnProgress
    ) -> dict[int, Shards]:
        """Write parts; returns the shards of each."""
        workers = min(self.workers or os.cpu_count() or 1, len(todo))
        if workers == 1:
            worker = Worker(job, reading)
            return {part: worker.write(part, slices, on_progress) for part, slices in todo.items()}
        spawn = multiprocessing.get_context("spawn")  # a fork beside torch's threads may hang
        lifeline, held_here = spawn.Pipe(duplex=False)
        whole = {}
        begin = _begin_worker, (job, reading, lifeline)
        with lifeline, held_here, ProcessPoolExecutor(workers, spawn, *begin) as pool:
            try:
                # the pool starts its processes while tasks are submitted
                with _bare_main(), _no_ctrl_c():
                    futures = {pool.submit(_work, part, slices): part for part, slices in todo.items()}
                for future in as_completed(futures):
                    shards = whole[futures[future]] = future.result()
                    on_progress(*counted(shards))
            except BaseException as error:
                # Ends the workers at once, where a part may take minutes; and after one was killed the
                # pool's own signal does not always reach the others, for which it would wait for ever.
                held_here.close()
                if isinstance(error, BrokenProcessPool):
                    raise RuntimeError(
                        "a process that tokenises was killed, perhaps because memory ran out: run "
                        f"again, with fewer than build_workers={workers}; what is whole is kept"
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
    _worker = Worker(job, reading)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """End this process when its parent ends or gives up: a killed build must not go on writing."""
    multiprocessing.connection.wait([lifeline])  # the parent holds the other end, and sends nothing
    os._exit(1)


def _work(part: int, slices: list[FileSlice]) -> Shards:
    assert _worker is not None
    return _worker.write(part, slices)
