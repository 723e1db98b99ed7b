"""The work of a build as tasks on a Ray cluster; the only file that imports ray.

Every node has this package, and sees texts and data_dir, where they are no URLs, under the same absolute
paths. Only lists of shards come back to the driver: tokens go from the tasks to where they are kept.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import signal
import socket
import threading
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lit_gptdata.text.formats import FileSlice, Reading
from lit_gptdata.text.remote_file import TextFile, sha256_of, size_of
from lit_gptdata.tokens.build.encode import Job, OnProgress
from lit_gptdata.tokens.build.output import Destination, InFolder, Shards
from lit_gptdata.tokens.build.parts import Todo, Worker, counted
from lit_gptdata.tokens.shards import writing

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError("build='ray' needs the package ray: pip install 'lit-gptdata[ray]'") from error

RETRIES = 3
"""How often Ray runs a task again whose worker or node was lost."""

QUEUED = 2
"""Tasks a core that Ray has at a time, of tens of thousands: one runs, and the next one is there when it
ends; a cluster that grows with its load sees that there is more to do."""

SILENCE = 60.0
"""Seconds without a first result, after which to say what the cluster has; a task takes seconds."""

HASH_BYTES = 256 << 20
"""Bytes of files that a task hashes, at least: a fraction of a second of work."""

ANSWER = 10.0
"""Seconds within which a cluster takes a connection; Ray itself tries for minutes."""

T = TypeVar("T")

Noted = list[tuple[type[Warning], str]]
"""What a task warned of."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayTasks:
    """A `Runner`: tasks on a cluster, `workers` at a time, None: as many as the cluster takes.

    `address`: of the cluster, see `GPTDataModule`. Every method raises ConnectionError if none is there.
    """

    workers: int | None = None
    address: str | None = None

    def session(self) -> AbstractContextManager[None]:
        """Be connected to a cluster; what was begun here ends here, a cluster that was there goes on."""
        return _connected(self.address)

    def write(
        self, job: Job, reading: Reading, todo: Todo, on_progress: OnProgress
    ) -> dict[int, Shards]:
        """A task a part; returns the shards of each."""
        whole: dict[int, Shards] = {}
        job = replace(job, destination=_absolute(job.destination))
        with self.session(), _seen_by_all_nodes(job.destination) as sign:
            # in a list, so that Ray leaves it to the task whether to fetch it
            shared = [ray.put((job, reading, sign))]
            build = uuid.uuid4().hex
            begin = functools.partial(_write.remote, shared, build)
            slices = {part: [replace(s, path=_absolute(s.path)) for s in todo[part]] for part in todo}
            with contextlib.closing(self._results(begin, slices)) as results:
                for part, shards in results:
                    whole[part] = shards
                    on_progress(*counted(shards))
        return whole

    def hash(self, files: Sequence[TextFile], on_bytes: Callable[[int], object]) -> list[str]:
        """A task some files; returns the SHA-256 (hex) of each."""
        groups = _groups([_absolute(file) for file in files])
        hashes: dict[int, list[str]] = {}
        with self.session(), contextlib.closing(self._results(_hash.remote, groups)) as results:
            for number, found in results:
                hashes[number] = found
                on_bytes(sum(map(size_of, groups[number])))
        return [sha256 for number in sorted(hashes) for sha256 in hashes[number]]

    def _results(
        self, begin: Callable[[int, Any], Any], todo: Mapping[int, Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """What the task of each number gives, as they end; what a task warned of is a warning here."""
        waiting = iter(todo.items())
        running: dict[Any, int] = {}
        none_yet = True
        try:
            while True:
                room = self.workers or QUEUED * max(1, int(ray.cluster_resources().get("CPU", 0)))
                for number, work in itertools.islice(waiting, max(0, room - len(running))):
                    running[begin(number, work)] = number
                if not running:
                    return
                for task in _done(list(running), first=none_yet):
                    none_yet = False
                    yield running.pop(task), _result(task, self.workers)
        finally:
            for task in running:  # none, unless something failed
                ray.cancel(task, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
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
def _seen_by_all_nodes(destination: Destination) -> Iterator[Path | None]:
    """A file by which a node sees that its folder is the driver's, and not one of the same name."""
    folder = destination.notes_folder
    if folder is None:
        yield None
        return
    sign = folder / f"sign-{uuid.uuid4().hex}"
    with writing(sign):
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def _absolute(place: T) -> T:
    """A file or a folder by a path that means the same in a worker's folder as in this process's."""
    if isinstance(place, InFolder):
        return replace(place, folder=place.folder.absolute())
    return place.absolute() if isinstance(place, Path) else place


def _groups(files: list[TextFile]) -> dict[int, list[TextFile]]:
    """Files in order, as many together as are worth a task."""
    groups: dict[int, list[TextFile]] = {}
    room = 0
    for file in files:
        if room <= 0:
            groups[len(groups)] = []
            room = HASH_BYTES
        groups[len(groups) - 1].append(file)
        room -= size_of(file)
    return groups


def _done(tasks: list[Any], *, first: bool) -> list[Any]:
    """All tasks that have ended, at least one."""
    if first and not ray.wait(tasks, timeout=SILENCE)[0]:
        log.warning(
            "no task was done for %.0f seconds; a task takes a CPU, and of the Ray cluster's %s there "
            "are free: %s",
            SILENCE, ray.cluster_resources(), ray.available_resources(),
        )  # fmt: skip
    ray.wait(tasks)
    done: list[Any] = ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]
    return done


def _result(task: Any, workers: int | None) -> Any:
    """What a task gave; what it warned of is a warning here, and its error is raised."""
    try:
        found, noted = ray.get(task)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayError):  # Ray's own: it could not unpack what the task needs
            raise RuntimeError(
                f"a node of the Ray cluster cannot take part ({str(cause).splitlines()[0]}): install "
                "the same lit-gptdata, tiktoken and extras on every node"
            ) from error
        known = isinstance(cause, (ValueError, OSError, ImportError))
        raise cause from None if known else error
    except RayError as error:
        raise RuntimeError(
            f"a Ray task was lost {RETRIES + 1} times ({type(error).__name__}), perhaps "
            f"because memory ran out: run again, with a lower build_workers than {workers or 'null'}; "
            "what is whole is kept"
        ) from error
    for kind, message in noted:
        warnings.warn(message, kind, stacklevel=2)
    return found


# In a worker ----------------------------------------------------------------------------------------

_kept: tuple[str, Worker] | None = None
"""What a worker process keeps between two parts: which build it is of, and the engine, loaded."""


def _write_part(
    shared: list[Any], build: str, part: int, slices: list[FileSlice]
) -> tuple[Shards, Noted]:
    global _kept
    with _noted() as noted:
        if _kept is None or _kept[0] != build:
            job, reading, sign = ray.get(shared[0])
            _check_seen(sign)
            _kept = build, Worker(job, reading)
        shards = _kept[1].write(part, slices)
    return shards, noted


def _hash_files(number: int, files: list[TextFile]) -> tuple[list[str], Noted]:
    with _noted() as noted:
        hashes = [sha256_of(file) for file in files]
    return hashes, noted


@contextlib.contextmanager
def _noted() -> Iterator[Noted]:
    """What is warned of meanwhile, at its end; a file that is missing is said to be so on this node."""
    noted: Noted = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # each once
        try:
            yield noted
        except FileNotFoundError as error:
            if error.filename is None:  # no file of the corpus, nor of data_dir
                raise
            raise FileNotFoundError(
                error.errno,
                f"{error.strerror} on the node {socket.gethostname()}, and build='ray' needs the texts "
                "and data_dir on every node, under the same paths",
                error.filename,
            ) from None
    noted += [(warning.category, str(warning.message)) for warning in seen]


def _check_seen(sign: Path | None) -> None:
    if sign is not None and not sign.exists():
        raise FileNotFoundError(
            f"the node {socket.gethostname()} does not see {sign}, which is there for the driver: set "
            "data_dir to a folder that all nodes of the Ray cluster share, or publish to an object store"
        )


_write = ray.remote(num_cpus=1, max_retries=RETRIES)(_write_part)
_hash = ray.remote(num_cpus=1, max_retries=RETRIES)(_hash_files)
