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
from dataclasses import replace
from pathlib import Path
from typing import Any

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
CONNECT_S = 10.0  # to wait for a connection to the cluster; Ray itself would try for minutes

log = logging.getLogger(__name__)


def encode_units(encoder: Encoder, units: WorkUnits, on_progress: OnProgress) -> dict[int, Shards]:
    """A `Runner` with `workers` tasks at the same time (None: all that the cluster can run).

    If it starts a cluster, it stops it as well. Raises ConnectionError if no cluster answers.
    """
    workers = encoder.options.workers
    finished: dict[int, Shards] = {}
    running: dict[Any, int] = {}
    timeout_s: float | None = SILENCE_S  # of the first result
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            _connect(encoder.options.ray_address)
        # Ray fetches an argument before a task, but not inside a list: a worker needs it only once
        shared, waiting = [ray.put(encoder)], iter(units.items())
        try:
            while True:
                n_cores = int(ray.cluster_resources().get("CPU", 0))
                limit = workers or TASKS_PER_CORE * max(1, n_cores)
                for unit, parts in itertools.islice(waiting, max(0, limit - len(running))):
                    task = _encode_task.remote(shared, unit, list(map(_absolute, parts)))
                    running[task] = unit
                if not running:
                    return finished
                ended = ray.wait(list(running), timeout=timeout_s)[0]
                if not ended:
                    problem = f"no task ended within {SILENCE_S:.0f} seconds. Each task needs a CPU"
                    has, free = ray.cluster_resources(), ray.available_resources()
                    log.warning("%s; the Ray cluster has %s, free: %s", problem, has, free)
                timeout_s = None
                for task in ended:
                    unit = running.pop(task)
                    finished[unit] = _result(task, workers)
                    on_progress(*bytes_and_tokens(finished[unit]))
        finally:
            for task in running:  # empty unless something failed
                ray.cancel(task, force=True)


def _absolute(part: Any) -> Any:
    """A slice for a worker, which has another current folder."""
    return replace(part, path=part.path.absolute()) if isinstance(part.path, Path) else part


def _result(task: Any, workers: int | None) -> Any:
    """The result of a task; its errors are raised in this process."""
    try:
        return ray.get(task)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayError):  # Ray could not unpickle the arguments of the task
            problem = f"a node of the Ray cluster cannot run a task ({str(cause).splitlines()[0]})"
            advice = "install the same lit-gptdata, tiktoken and extras on every node"
            raise RuntimeError(f"{problem}: {advice}") from error
        if isinstance(cause, FileNotFoundError) and cause.filename:
            advice = "build='ray' needs the texts and data_dir under the same paths on every node"
            cause.strerror = f"{cause.strerror}. {advice}"
        raise cause from None if isinstance(cause, (ValueError, OSError, ImportError)) else error
    except RayError as error:
        reason = f"({type(error).__name__}), perhaps because memory ran out"
        advice = f"run again with fewer build_workers than {workers or 'now'}; finished work is kept"
        raise RuntimeError(f"a Ray task was lost {RETRIES + 1} times {reason}: {advice}") from error


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


def _encode_unit(shared: Any, unit: int, parts: Any) -> Shards:
    return _fetch_encoder(shared[0]).encode_unit(unit, parts)


_encode_task = ray.remote(num_cpus=1, max_retries=RETRIES)(_encode_unit)
