"""A Ray cluster of two nodes of this machine, and the processes that work for it."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """The address of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    # short: a socket's path holds 107 bytes
    folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with folder as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        options = {"num_cpus": 1, "object_store_memory": 100 << 20}
        handler = signal.getsignal(signal.SIGTERM)  # a node puts its own in place
        nodes = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
        nodes.add_node(**options)
        signal.signal(signal.SIGTERM, handler)
        try:
            yield nodes.address
        finally:
            nodes.shutdown()


def tokenising(ancestor: int) -> list[int]:
    """The processes below `ancestor` that write a part now."""
    parent_of, busy = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid = int(folder.name)
            parent_of[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::_write_part"):
                busy.append(pid)

    def below(pid: int) -> bool:
        return pid == ancestor or (pid in parent_of and below(parent_of[pid]))

    return [pid for pid in busy if below(pid)]
