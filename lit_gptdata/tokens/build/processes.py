"""Run the work of a build in processes on this machine."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from typing import Any

from lit_gptdata.tokens.build.encode import Encoder, OnProgress, WorkUnits, bytes_and_tokens, encode_here
from lit_gptdata.tokens.build.output import Shards

log = logging.getLogger(__name__)

_main_module = threading.Lock()  # held while another module stands in for it
_encoder: Encoder | None = None  # of this worker process, with its engine


def encode_units(encoder: Encoder, units: WorkUnits, on_progress: OnProgress) -> dict[int, Shards]:
    """A `Runner` with `workers` processes (None: one per core); a single worker is this process."""
    workers = min(encoder.options.workers or os.cpu_count() or 1, len(units))
    if workers > 1 and not _may_start_processes():
        log.warning("this process may not start others, so it tokenizes without %d workers", workers)
        workers = 1
    if workers == 1:
        return encode_here(encoder, units, on_progress)
    spawn = multiprocessing.get_context("spawn")  # a fork may hang if torch has started threads
    lifeline, parent_end = spawn.Pipe(duplex=False)
    start = _start_worker, (encoder, lifeline)
    with lifeline, parent_end, ProcessPoolExecutor(workers, spawn, *start) as pool:
        try:
            # the pool starts its processes while tasks are submitted
            with _empty_main_module(), _without_ctrl_c():
                futures = {unit: pool.submit(_encode_unit, unit, units[unit]) for unit in units}
            for future in as_completed(futures.values()):
                on_progress(*bytes_and_tokens(future.result()))
            return {unit: future.result() for unit, future in futures.items()}
        except BaseException as error:
            # This ends all workers at once. Otherwise their work units could take minutes, and after
            # one was killed the pool does not always end the others, so it could wait forever.
            parent_end.close()
            if isinstance(error, BrokenProcessPool):
                advice = f"run again with fewer than build_workers={workers}; finished work is kept"
                problem = "a worker process was killed, perhaps because memory ran out"
                raise RuntimeError(f"{problem}: {advice}") from error
            raise


def _may_start_processes() -> bool:
    """False in a worker of multiprocessing.Pool (a daemon) or joblib (its children would not start)."""
    method = multiprocessing.get_start_method(allow_none=True) or "spawn"
    known = method in multiprocessing.get_all_start_methods()  # joblib has its own
    return known and not multiprocessing.current_process().daemon


@contextlib.contextmanager
def _empty_main_module() -> Iterator[None]:
    """Keep spawned processes from importing the user's script: it could load torch or run twice."""
    with _main_module:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Make processes that start in this context ignore Ctrl-C; this process handles it afterwards."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # only it may set a handler
    handler = signal.getsignal(signal.SIGINT) if is_main else None  # also None if C code has set it
    if handler is not None:
        signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


def _start_worker(encoder: Encoder, lifeline: Connection) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()


def _exit_with_parent(lifeline: Connection) -> None:
    """End this process when its parent ends or gives up, so a killed build stops writing."""
    wait([lifeline])  # returns when the parent's end is closed
    os._exit(1)


def _encode_unit(unit: int, parts: Any) -> Shards:
    assert _encoder is not None
    return _encoder.encode_unit(unit, parts)
