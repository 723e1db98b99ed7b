"""The parts of a build as tasks on a Ray cluster; the only file that imports ray.

Every node has this package, and sees the texts and data_dir under the same absolute paths. Only lists of
shards come back to the driver: tokens go from the tasks to data_dir.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_gptdata.text.formats import FileSlice, Reading
from lit_gptdata.tokens.encode import Job, OnProgress, Shards
from lit_gptdata.tokens.parts import Todo, Worker, counted
from lit_gptdata.tokens.shard import writing

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError("build='ray' needs the package ray: pip install 'lit-gptdata[ray]'") from error

RETRIES = 3
"""How often Ray runs a part again whose worker or node was lost."""

QUEUED = 2
"""Tasks a core that Ray has at a time, of tens of thousands: one runs, and the next one is there when it
ends; a cluster that grows with its load sees that there is more to do."""

SILENCE = 60.0
"""Seconds without a first part, after which to say what the cluster has; a part takes seconds."""

ANSWER = 10.0
"""Seconds within which a cluster takes a connection; Ray itself tries for minutes."""

Noted = list[tuple[type[Warning], str]]
"""What a task warned of."""

log = logging.getLogger(__name__)


def by_ray(
    job: Job,
    reading: Reading,
    todo: Todo,
    on_progress: OnProgress,
    *,
    workers: int | None,
    address: str | None,
) -> dict[int, Shards]:
    """A `RunParts`: a task a part, `workers` at a time, None: as many as the cluster takes.

    `address`: of the cluster, see `GPTDataModule`. Raises ConnectionError if none is there.
    """
    whole: dict[int, Shards] = {}
    job = replace(job, folder=job.folder.absolute())
    parts = iter(todo.items())
    running: dict[Any, int] = {}
    with _connected(address), _seen_by_all_nodes(job) as sign:
        # in a list, so that Ray leaves it to the task whether to fetch it
        shared = [ray.put((job, reading, sign))]
        try:
            while True:
                room = workers or QUEUED * max(1, int(ray.cluster_resources().get("CPU", 0)))
                for part, slices in itertools.islice(parts, max(0, room - len(running))):
                    running[_task.remote(shared, sign.name, part, _absolute(slices))] = part
                if not running:
                    return whole
                for task in _done(list(running), first=not whole):
                    part = running.pop(task)
                    whole[part] = _result(task, workers)
                    on_progress(*counted(whole[part]))
        finally:
            for task in running:  # none, unless something failed
                ray.cancel(task, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster; what was begun here ends here, a cluster that was there goes on."""
    if ray.is_initialized():
        yield
        return
    try:
        _connect(address)
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        with _own_sigterm(), _no_usage_stats():
            _check_answers(named)
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ValueError, OSError) as error:
        raise ConnectionError(
            f"no Ray cluster at ray_address={named!r} ({error}): begin one with `ray start --head` and "
            "give its host:port, or ray_address='local'"
        ) from error


def _check_answers(address: str) -> None:
    """Raise OSError if nobody listens at host:port; other addresses are for Ray to check."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep Ray from replacing what this program does at SIGTERM: Lightning saves a checkpoint."""
    handler = signal.getsignal(signal.SIGTERM)  # None: not Python's
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _no_usage_stats() -> Iterator[None]:
    """A Ray that begins meanwhile does not report itself to its makers."""
    name = "RAY_USAGE_STATS_ENABLED"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _seen_by_all_nodes(job: Job) -> Iterator[Path]:
    """A file by which a node sees that its data_dir is the driver's, and not one of the same name."""
    sign = job.folder / f"sign-{uuid.uuid4().hex}"
    with writing(sign):
        sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def _absolute(slices: list[FileSlice]) -> list[FileSlice]:
    """With paths that mean the same in a worker's folder as in this process's."""
    return [
        replace(piece, path=piece.path.absolute()) if isinstance(piece.path, Path) else piece
        for piece in slices
    ]


def _done(tasks: list[Any], *, first: bool) -> list[Any]:
    """All tasks that have ended, at least one."""
    if first and not ray.wait(tasks, timeout=SILENCE)[0]:
        log.warning(
            "no part was done for %.0f seconds; a part takes a CPU, and of the Ray cluster's %s there "
            "are free: %s",
            SILENCE, ray.cluster_resources(), ray.available_resources(),
        )  # fmt: skip
    ray.wait(tasks)
    done: list[Any] = ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]
    return done


def _result(task: Any, workers: int | None) -> Shards:
    """The shards that a task wrote; what it warned of is a warning here, and its error is raised."""
    try:
        shards: Shards
        shards, noted = ray.get(task)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayError):  # Ray's own: it could not unpack what the task needs
            raise RuntimeError(
                f"a node of the Ray cluster cannot tokenise ({str(cause).splitlines()[0]}): install the "
                "same lit-gptdata, tiktoken and extras on every node"
            ) from error
        known = isinstance(cause, (ValueError, OSError, ImportError))
        raise cause from None if known else error
    except RayError as error:
        raise RuntimeError(
            f"a Ray task that tokenises was lost {RETRIES + 1} times ({type(error).__name__}), perhaps "
            f"because memory ran out: run again, with a lower build_workers than {workers or 'null'}; "
            "what is whole is kept"
        ) from error
    for kind, message in noted:
        warnings.warn(message, kind, stacklevel=2)
    return shards


# In a worker ----------------------------------------------------------------------------------------

_kept: tuple[str, Worker] | None = None
"""What a worker process keeps between two parts: which build it is of, and the engine, loaded."""


def _work(shared: list[Any], build: str, part: int, slices: list[FileSlice]) -> tuple[Shards, Noted]:
    global _kept
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # each once
        if _kept is None or _kept[0] != build:
            job, reading, sign = ray.get(shared[0])
            _check_seen(sign)
            _kept = build, Worker(job, reading)
        try:
            shards = _kept[1].write(part, slices)
        except FileNotFoundError as error:
            if error.filename is None:  # no file of the corpus, nor of data_dir
                raise
            raise FileNotFoundError(
                error.errno,
                f"{error.strerror} on the node {socket.gethostname()}, and build='ray' needs the texts "
                "and data_dir on every node, under the same paths",
                error.filename,
            ) from None
    return shards, [(warning.category, str(warning.message)) for warning in seen]


def _check_seen(sign: Path) -> None:
    if not sign.exists():
        raise FileNotFoundError(
            f"the node {socket.gethostname()} does not see {sign}, which is there for the driver: set "
            "data_dir to a folder that all nodes of the Ray cluster share"
        )


_task = ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
