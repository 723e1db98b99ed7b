"""Run the work of a build as tasks on a Ray cluster. This is the only file that imports ray.

Every node needs this package, and must see the texts and data_dir under the same paths, unless they are
URLs. Workers write their shards directly. Only lists of shards come back to the driver.
"""

import contextlib
import functools
import itertools
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_gptdata.text.formats import FileSlice
from lit_gptdata.text.remote_file import OnBytes, TextFile, sha256_of, size_of
from lit_gptdata.tokens.build.encode import Encoder, OnProgress, WorkUnits, bytes_and_tokens
from lit_gptdata.tokens.build.output import Shards

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError("build='ray' needs the package ray: pip install 'lit-gptdata[ray]'") from error

RETRIES = 3  # how often Ray repeats a task if its worker or node was lost
TASKS_PER_CORE = 2  # one runs and one waits: no core is idle, and a cluster that scales sees more work
SILENCE_S = 60.0  # without a first result; then a warning reports the resources. A task takes seconds
HASH_BYTES = 256 << 20  # the least that a task hashes: a fraction of a second of work
CONNECT_S = 10.0  # to wait for a connection to the cluster; Ray itself would try for minutes

CaughtWarnings = list[tuple[type[Warning], str]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayTasks:
    """A `Runner` with `workers` tasks at the same time (None: all that the cluster can run).

    `address`: see `GPTDataModule`. Every method raises ConnectionError if no cluster answers.
    """

    workers: int | None = None
    address: str | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Connects to a cluster. If the session started the cluster, its end stops the cluster."""
        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                stack.callback(ray.shutdown)
                _connect(self.address)
            yield

    def encode(self, encoder: Encoder, units: WorkUnits, on_progress: OnProgress) -> dict[int, Shards]:
        finished: dict[int, Shards] = {}
        with self.session():
            # Ray fetches an argument before a task, but not inside a list: a worker needs it only once
            shared = [ray.put(encoder)]
            start = functools.partial(_encode_task.remote, shared)
            slices = {unit: [replace(s, path=_absolute(s.path)) for s in units[unit]] for unit in units}
            with contextlib.closing(self._results(start, slices)) as results:
                for unit, shards in results:
                    finished[unit] = shards
                    on_progress(*bytes_and_tokens(shards))
        return finished

    def hash(self, files: Sequence[TextFile], on_bytes: OnBytes) -> list[str]:
        """Hash files in tasks, several small files in each; returns the SHA-256 (hex) of each file."""
        groups: dict[int, list[TextFile]] = {}  # of about HASH_BYTES
        for file, end in zip(files, itertools.accumulate(map(size_of, files)), strict=True):
            groups.setdefault((end - 1) // HASH_BYTES, []).append(_absolute(file))
        hashes: dict[int, list[str]] = {}
        with self.session(), contextlib.closing(self._results(_hash_task.remote, groups)) as results:
            for number, found in results:
                hashes[number] = found
                on_bytes(sum(map(size_of, groups[number])))
        return [sha256 for number in sorted(hashes) for sha256 in hashes[number]]

    def _results(self, start: Any, work: Mapping[int, Any]) -> Generator[tuple[int, Any], None, None]:
        """Start a task for each number and yield (number, result) as the tasks end."""
        waiting = iter(work.items())
        running: dict[Any, int] = {}
        timeout_s: float | None = SILENCE_S  # of the first result
        try:
            while True:
                n_cores = int(ray.cluster_resources().get("CPU", 0))
                limit = self.workers or TASKS_PER_CORE * max(1, n_cores)
                for number, item in itertools.islice(waiting, max(0, limit - len(running))):
                    running[start(number, item)] = number
                if not running:
                    return
                ended = ray.wait(list(running), timeout=timeout_s)[0]
                if not ended:
                    problem = f"no task ended within {SILENCE_S:.0f} seconds. Each task needs a CPU"
                    has, free = ray.cluster_resources(), ray.available_resources()
                    log.warning("%s; the Ray cluster has %s, free: %s", problem, has, free)
                timeout_s = None
                for task in ended:
                    yield running.pop(task), _result(task, self.workers)
        finally:
            for task in running:  # empty unless something failed
                ray.cancel(task, force=True)


def _absolute(file: TextFile) -> TextFile:
    """For a worker, which has another current folder."""
    return file.absolute() if isinstance(file, Path) else file


def _result(task: Any, workers: int | None) -> Any:
    """The result of a task; its warnings are repeated and its errors raised in this process."""
    try:
        result, caught = ray.get(task)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayError):  # Ray could not unpickle the arguments of the task
            problem = f"a node of the Ray cluster cannot run a task ({str(cause).splitlines()[0]})"
            advice = "install the same lit-gptdata, tiktoken and extras on every node"
            raise RuntimeError(f"{problem}: {advice}") from error
        raise cause from None if isinstance(cause, (ValueError, OSError, ImportError)) else error
    except RayError as error:
        reason = f"({type(error).__name__}), perhaps because memory ran out"
        advice = f"run again with fewer build_workers than {workers or 'now'}; finished work is kept"
        raise RuntimeError(f"a Ray task was lost {RETRIES + 1} times {reason}: {advice}") from error
    for kind, message in caught:
        warnings.warn(message, kind, stacklevel=2)
    return result


def _connect(address: str | None) -> None:
    name = address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that ray.init starts
    handler = signal.getsignal(signal.SIGTERM)  # None if it was not set from Python
    try:
        host, _, port = name.rpartition(":")
        if port.isdigit() and "/" not in host:  # Ray checks the other kinds of addresses
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ValueError, OSError) as error:
        advice = "start one with `ray start --head` and give its host:port, or use ray_address='local'"
        raise ConnectionError(f"no Ray cluster at ray_address={name!r} ({error}): {advice}") from error
    finally:  # Ray replaces the handler, but Lightning saves a checkpoint in it
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@functools.lru_cache(maxsize=1)
def _fetch_encoder(shared: Any) -> Encoder:
    """The encoder of a build, fetched once by each worker process."""
    return ray.get(shared)  # type: ignore[no-any-return]


def _encode_unit(shared: Any, unit: int, slices: list[FileSlice]) -> tuple[Shards, CaughtWarnings]:
    with _caught_warnings() as caught:
        return _fetch_encoder(shared[0]).encode_unit(unit, slices), caught


def _hash_files(number: int, files: list[TextFile]) -> tuple[list[str], CaughtWarnings]:
    with _caught_warnings() as caught:
        return [sha256_of(file) for file in files], caught


@contextlib.contextmanager
def _caught_warnings() -> Iterator[CaughtWarnings]:
    """Catch the block's warnings in a list. An error about a missing file gets the name of this node."""
    caught: CaughtWarnings = []
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("default")  # each warning once
        try:
            yield caught
        except FileNotFoundError as error:
            if error.filename is None:  # not about a file of the corpus or of data_dir
                raise
            advice = "build='ray' needs the texts and data_dir under the same paths on every node"
            problem = f"{error.strerror} on the node {socket.gethostname()}. {advice}"
            raise FileNotFoundError(error.errno, problem, error.filename) from None
    caught += [(warning.category, str(warning.message)) for warning in records]


_encode_task = ray.remote(num_cpus=1, max_retries=RETRIES)(_encode_unit)
_hash_task = ray.remote(num_cpus=1, max_retries=RETRIES)(_hash_files)
